"""`llmbuild run --chat` and `Model.chat`: answers through the template of a built model."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmbuild.cli.talk import fitting
from llmbuild.errors import InputError
from llmbuild.runtime import load, reader
from llmbuild.runtime.chat import ChatTemplate
from llmbuild.runtime.model import Model
from tests.conftest import CHAT, Project, llmbuild, project_in
from tests.support.chats import chat

CONTEXT = 32


@pytest.fixture(scope="module")
def model(chatty: Project) -> Model:
    return load(chatty.catalog, "tiny")


def run(project: Project, *arguments: str, said: str | bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run the command on a chat that standard input may hold."""
    command = [sys.executable, "-m", "llmbuild", "run", "tiny", "-C", str(project.catalog), *arguments]
    data = said.encode() if isinstance(said, str) else said or b""
    return subprocess.run(command, input=data, capture_output=True, check=False, timeout=120)


def test_a_model_that_was_built_before_gets_its_template_and_its_keys_stay(chatty: Project, built: Project) -> None:
    before, after = ({r["variant"]: r for r in reader.variants(p.catalog, "tiny")} for p in (built, chatty))
    assert before.keys() == after.keys()
    assert {row["chat"] for row in before.values()} == {None}
    assert all(after[name]["tpot_s"] == row["tpot_s"] for name, row in before.items())
    again = llmbuild("build", chatty.recipe, "-C", chatty.catalog)
    assert "up to date" in again.stderr
    assert "up to date" in llmbuild("build", built.recipe, "-C", built.catalog).stderr


def test_a_chat_is_what_generate_says_to_the_rendered_text(model: Model) -> None:
    messages = chat("ab", system="s")
    rendered = "s:s\nu:ab\na:"
    said = model.chat(messages, 9, temperature=3.0, seed=1)
    assert list(said.prompt) == model.tokenizer.encode(rendered).ids == model.encode_chat(messages).ids
    text = "".join(model.generate(rendered, 9, temperature=3.0, seed=1))
    assert ("".join(said), said.finish_reason) == (text, "length")
    whole = "".join(model.chat(messages, 9, stop=[text[2]]))
    assert text[2] not in whole


def test_an_answer_ends_at_the_end_token_of_the_template(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = model.encode_chat(chat("ab")).ids
    tokens = list(model.tokens(prompt, 6))
    at = tokens.index(tokens[3])
    ends = ChatTemplate(CHAT, {"eos_token": model.tokenizer.name(tokens[at])})
    monkeypatch.setitem(model.__dict__, "chat_template", ends)
    said = model.chat(chat("ab"), 6)
    decoder = model.tokenizer.decoder(prompt)
    text = "".join([*map(decoder.push, tokens[:at]), decoder.end()])
    assert ("".join(said), said.finish_reason) == (text, "stop")


def test_what_does_not_fit_is_told(model: Model) -> None:
    with pytest.raises(InputError, match=r"the chat: \d+ tokens do not fit in a context of 32"):
        model.chat(chat("x y z " * 20))


def test_a_message_is_answered_and_nothing_else_is_printed(chatty: Project, model: Model) -> None:
    text = "".join(model.chat(chat("ab"), 1 << 20))
    for arguments, said in ((("--prompt", "ab"), None), ((), "ab\n"), (("--prompt", "-"), "ab"), ((), "ab")):
        done = run(chatty, "--chat", *arguments, said=said)
        assert (done.returncode, done.stdout.decode()) == (0, f"{text}\n"), done.stderr
    told = done.stderr.decode()
    assert f"prompt of {len(model.encode_chat(chat('ab')).tokens)} tokens" in told
    assert f"the context of {CONTEXT} tokens is full: the answer ends here" in told


def test_the_options_of_an_answer_and_a_system_message(chatty: Project, model: Model) -> None:
    options = ["--max-new-tokens", "5", "--temperature", "2", "--seed", "3", "--top-k", "9"]
    done = run(chatty, "--chat", "--system", "s", "--prompt", "ab", *options)
    text = "".join(model.chat(chat("ab", system="s"), 5, temperature=2.0, seed=3, top_k=9))
    assert (done.returncode, done.stdout.decode()) == (0, f"{text}\n"), done.stderr
    assert b"is full" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said", "told"),
    [
        (("--chat",), "", "--chat: standard input holds no message: give one there, or with --prompt TEXT"),
        (("--chat",), "\n", "--chat: standard input holds no message"),
        (("--chat",), b"\xff", "standard input is not UTF-8 text: byte 0 cannot be read"),
        (("--system", "s", "--prompt", "a"), "", "--system is the system message of a chat: give --chat too"),
        (("--chat", "--prompt", "a b c " * 20), "", "tokens do not fit in a context of 32"),
        (("--chat", "--prompt", "a", "--top-p", "7"), "", "top_p"),
    ],
)
def test_what_is_no_message_is_one_line(
    arguments: tuple[str, ...], said: str | bytes, told: str, chatty: Project
) -> None:
    done = run(chatty, *arguments, said=said)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith("error: ")
    assert told in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


def test_a_model_without_a_template_says_that_it_has_none(built: Project) -> None:
    done = run(built, "--chat", "--prompt", "a")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"model tiny has no chat template in" in done.stderr


# --- a conversation ------------------------------------------------------------------------------------------------


def conversation(project: Project, typed: str, *arguments: str) -> tuple[int, str, str]:
    """Return the exit code of a chat whose lines are typed on a terminal, its answers, and what it said besides."""
    near, far = pty.openpty()
    command = [sys.executable, "-m", "llmbuild", "run", "tiny", "--chat", "-C", str(project.catalog), *arguments]
    child = subprocess.Popen(command, stdin=far, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(far)
    try:
        os.write(near, typed.encode() + b"\x04")
        out, told = child.communicate(timeout=120)
    finally:
        child.kill()
        os.close(near)
    return child.returncode, out.decode(), told.decode()


def test_a_conversation_keeps_its_history(chatty: Project, model: Model) -> None:
    first = "".join(model.chat(chat("a"), 2))
    second = "".join(model.chat(chat("a", first, "b"), 2))
    code, out, told = conversation(chatty, "a\n\n  \nb\n", "--max-new-tokens", "2")
    assert (code, out) == (0, f"{first}\n{second}\n"), told
    assert "each line is a message; end the chat with Ctrl-D" in told
    assert told.count("> ") == 5


def test_a_conversation_leaves_its_first_turns_out_where_the_context_is_full_and_says_so(
    chatty: Project, model: Model
) -> None:
    code, out, told = conversation(chatty, "a b c\n" * 4, "--max-new-tokens", "4", "--system", "s")
    assert (code, len(out.splitlines()) >= 4) == (0, True), told
    assert "the context of 32 tokens is full: the first 2 messages are left out" in told
    turns = [{"role": role, "content": "a b c"} for role in ("user", "assistant")] * 3
    kept = fitting(model, "s", [*turns, turns[0]], 4)
    fits = len(model.encode_chat([{"role": "system", "content": "s"}, *kept]).tokens)
    assert kept == [*turns, turns[0]][-len(kept) :]
    assert fits <= CONTEXT - 4 < len(model.encode_chat([{"role": "system", "content": "s"}, *turns[:2], *kept]).tokens)


def test_a_message_that_does_not_fit_is_left_out_and_the_chat_goes_on(chatty: Project, model: Model) -> None:
    first = "".join(model.chat(chat("a"), 2))
    second = "".join(model.chat(chat("a", first, "b"), 2))
    code, out, told = conversation(chatty, f"a\n{'x y z ' * 20}\nb\n", "--max-new-tokens", "2")
    assert (code, out) == (0, f"{first}\n{second}\n"), told
    assert "error: the chat: " in told and "do not fit in a context of 32" in told


def test_a_conversation_that_no_message_can_begin_ends_at_once(chatty: Project, built: Project) -> None:
    code, out, told = conversation(chatty, "a\n", "--system", "x y z " * 20)
    assert (code, out, "do not fit" in told) == (2, "", True)
    assert conversation(built, "a\n")[0] == 2


def test_the_library_is_loaded_for_a_chat_alone(chatty: Project) -> None:
    code = (
        "import sys, llmbuild; model = llmbuild.load(sys.argv[1], 'tiny'); list(model.generate('a', 1)); "
        "before = 'jinja2' in sys.modules; list(model.chat([{'role': 'user', 'content': 'a'}], 1)); "
        "print(before, 'jinja2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, chatty.catalog], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"


def test_a_build_tells_that_a_template_cannot_be_rendered(chatty: Project, tmp_path: Path) -> None:
    shutil.copytree(chatty.folder, tmp_path / "p")
    project = project_in(tmp_path / "p")
    (project.model / "chat_template.jinja").write_text("{% if %}")
    planned = llmbuild("build", project.recipe, "-n", "-C", project.catalog)
    assert "chats with this model will be refused" in planned.stderr, planned.stderr
    assert "these are ranked again, and nothing is made" in planned.stdout
    assert llmbuild("build", project.recipe, "-C", project.catalog).returncode == 0
    done = run(project, "--chat", "--prompt", "a")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"the chat template is not one of Jinja2: line 1" in done.stderr

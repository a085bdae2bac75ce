"""Launch lines of vLLM and SGLang: every flag is mapped, moot or refused, and the recipe is one that can be read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.cli.convert import SERVERS as NAMES
from llmbuild.cli.main import main
from llmbuild.errors import InputError
from llmbuild.search.knobs.space import knobs_of
from llmbuild.serve.convert.convert import SERVERS, Converted, convert_config, convert_line
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.target import LLVM_CPU
from tests.conftest import llmbuild

GIB = 10_000_000_000
SERVE = {name for parameter in main.commands["serve"].params for name in parameter.opts}


def vllm(text: str) -> Converted:
    return convert_line("vllm", text, lambda name: {}, GIB)


def kinds(made: Converted) -> dict[str, str]:
    return {one.flag: one.kind for one in made.flags}


def test_a_usual_line_becomes_a_recipe_and_a_command(tmp_path: Path) -> None:
    made = vllm(
        "vllm serve org/Some-Model --dtype bfloat16 --max_model_len=4k --kv-cache-dtype int8 --max-num-seqs 64 \\\n"
        "  --gpu-memory-utilization 0.5 --enable-chunked-prefill --port 9000 --served-model-name mine -tp 1 &"
    )
    (tmp_path / "made.yaml").write_text(made.recipe)
    recipe = read_recipe(tmp_path / "made.yaml")
    assert (recipe.name, recipe.model.location, recipe.context) == ("mine", "org/Some-Model", 4000)
    assert dict(recipe.knobs) == {"weight_format": ("bf16",), "kv_dtype": ("int8",)}
    options = "--max-sequences 64 --memory 5000MB --port 9000 --scheduler sarathi"
    assert made.serve == f"llmbuild serve mine {options}"
    assert Counter(one.kind for one in made.flags) == {"mapped": 9, "moot": 1}
    assert len(made.notes) == 1 and "--host 0.0.0.0" in made.notes[0]


def test_what_there_is_not_is_refused_by_name() -> None:
    made = vllm(
        "env VLLM_CPU_KVCACHE_SPACE=4 FOO=1 vllm serve m --tensor-parallel-size 2 --quantization awq --enable-lora "
        "--kv-cache-dtype fp8 --speculative-config '{\"a\": 1}' --limit-mm-per-prompt.image 2 --new-flag 3 -O3 extra"
    )
    assert kinds(made) == {
        "VLLM_CPU_KVCACHE_SPACE": "refused",
        "FOO": "refused",
        "--model m": "mapped",
        "--tensor-parallel-size 2": "refused",
        "--quantization awq": "refused",
        "--enable-lora": "refused",
        "--kv-cache-dtype fp8": "refused",
        "--speculative-config '{\"a\": 1}'": "refused",
        "--limit-mm-per-prompt.image image=2": "refused",
        "--new-flag 3": "refused",
        "-O3": "moot",
        "extra": "refused",
    }
    assert [one.why for one in made.flags if one.flag == "--new-flag 3"] == ["this llmbuild does not know the flag"]


@pytest.mark.parametrize(
    ("name", "words", "kind"),
    [
        ("vllm", 'vllm serve m --speculative-config \'{"method": "ngram", "prompt_lookup_max": 4}\'', "mapped"),
        ("vllm", 'vllm serve m --speculative-config \'{"method": "eagle", "model": "m2"}\'', "refused"),
        ("sglang", "python3 -m sglang.launch_server --model-path m --speculative-algorithm NGRAM", "mapped"),
        ("sglang", "python3 -m sglang.launch_server --model-path m --speculative-algorithm EAGLE", "refused"),
    ],
)
def test_prompt_lookup_is_mapped_and_what_there_is_not_is_refused(name: str, words: str, kind: str) -> None:
    made = convert_line(name, words, lambda file: {}, GIB)
    assert [one.kind for one in made.flags if "speculative" in one.flag] == [kind]
    assert ("--speculation ngram" in made.serve) == (kind == "mapped")


SMALL = "--speculative-draft-model-path org/Small-1"


@pytest.mark.parametrize(
    ("name", "words", "kinds"),
    [
        ("vllm", 'vllm serve m --speculative-config \'{"model": "org/Small-1", "num_speculative_tokens": 5}\'', "m"),
        ("vllm", 'vllm serve m --speculative-config \'{"method": "draft_model", "model": "org/Small-1"}\'', "m"),
        ("vllm", 'vllm serve m --speculative-config \'{"model": "org/EAGLE-Small-1"}\'', "r"),
        ("vllm", 'vllm serve m --speculative-config \'{"method": "draft_model"}\'', "r"),
        ("sglang", f"sglang serve --model-path m --speculative-algorithm STANDALONE {SMALL}", "mm"),
        ("sglang", f"sglang serve --model-path m {SMALL} --speculative-algorithm standalone", "mm"),
        ("sglang", f"sglang serve --model-path m --speculative-algorithm EAGLE3 {SMALL}", "rr"),
        ("sglang", "sglang serve --model-path m --speculative-algorithm STANDALONE", "r"),
        (
            "sglang",
            "sglang serve --model-path m --speculative-draft-model org/Small-1 --speculative-algorithm STANDALONE "
            "--speculative-num-steps 4 --speculative-eagle-topk 1 --speculative-num-draft-tokens 5",
            "mmooo",
        ),
    ],
)
def test_a_draft_model_is_mapped_and_a_head_of_the_model_is_refused(name: str, words: str, kinds: str) -> None:
    made = convert_line(name, words, lambda file: {}, GIB)
    of = {"m": "mapped", "o": "moot", "r": "refused"}
    assert [one.kind for one in made.flags if "speculative" in one.flag] == [of[kind] for kind in kinds]
    assert ("--draft Small-1" in made.serve and "--speculation draft" in made.serve) == ("m" in kinds)


def test_sglang_s_flags_have_their_own_names_and_port() -> None:
    made = convert_line(
        "sglang",
        "docker run -e TOKEN=secret lmsysorg/sglang:latest python3 -m sglang.launch_server --model-path org/m --tp 1 "
        "--chunked-prefill-size -1 --mem-fraction-static 0.8 --max-running-requests 8 --context-length 512 "
        "--disable-radix-cache --schedule-policy lpm --grammar-backend xgrammar --api-key very-secret-key",
        lambda name: {},
        GIB,
    )
    words = "--api-keys keys.txt --max-sequences 8 --memory 8000MB --port 30000 --scheduler fcfs"
    assert made.serve == f"llmbuild serve m {words}"
    assert [one.flag for one in made.refused] == ["--disable-radix-cache", "--schedule-policy lpm"]
    assert "secret" not in json.dumps([one.flag for one in made.flags])


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_of_the_tables_is_told(name: str) -> None:
    server = SERVERS[name]
    words = [server.program.commands[0][0], server.program.commands[0][1], "org/m"]
    names = [flag for flag in (*server.flags, *server.prefixes) if flag != server.program.positional]
    for flag in names:
        takes = server.find(flag).takes  # type: ignore[union-attr]
        words += [f"--{flag}", *(["1"] if takes else [])]
    made = convert_line(name, " ".join(words), lambda file: {}, GIB)
    assert len(made.flags) == len(names) + 1
    assert {one.flag.split()[0] for one in made.flags} >= {f"--{flag}" for flag in names}
    assert all(one.why for one in made.flags)


SECRET = ("api-key", "hf-token")
"""Flags whose values are told nobody."""
WORDS = st.lists(
    st.one_of(
        st.sampled_from([f"--{flag}" for flag in (*SERVERS["vllm"].flags, "unknown", "no-such") if flag not in SECRET]),
        st.sampled_from(["1", "auto", "-1", "x", "0.5", "-tp", "--a=b"]),
    ),
    max_size=12,
)


@given(WORDS)
def test_no_word_of_a_line_is_dropped(words: list[str]) -> None:
    try:
        made = vllm(" ".join(["vllm serve org/m", *words]))
    except InputError:  # a flag at the end without its value, or two one after the other
        assert any(word.startswith("-") for word in words)
        return
    told = " ".join(one.flag for one in made.flags)
    counted = Counter(told.replace("=", " ").split())
    for part, count in Counter(part for word in words for part in word.split("=")).items():
        assert counted[part] >= count, (part, told)


def test_what_is_mapped_is_what_there_is() -> None:
    knobs = {knob.name: knob for knob in knobs_of(LLVM_CPU)}
    line = "vllm serve m --port 1 --host h --api-key k --max-num-seqs 2 --gpu-memory-utilization 1 --shutdown-timeout 3"
    made = vllm(f"{line} --enable-chunked-prefill")
    assert {word for word in made.serve.split() if word.startswith("--")} <= SERVE
    for flag in ("--dtype half", "--dtype bfloat16", "--dtype float", "--kv-cache-dtype int8", "--kv-cache-dtype half"):
        for row in vllm(f"vllm serve m {flag}").recipe.partition("knobs:\n")[2].splitlines():
            knob, _, value = row.strip().partition(": ")
            assert value.strip("[]") in map(str, knobs[knob].domain)


def test_a_configuration_file_gives_the_same_and_the_line_wins(tmp_path: Path) -> None:
    body = {
        "model": "org/m",
        "max_model_len": 256,
        "enable-prefix-caching": False,
        "dtype": "half",
        "load-format": "dummy",
    }
    made = convert_config("vllm", body, GIB)
    assert kinds(made)["enable-prefix-caching"] == "refused"
    assert "random_init: true" in made.recipe and "context: 256" in made.recipe
    both = convert_line("vllm", "vllm serve org/other --config x.yaml --max-model-len 512", lambda name: body, GIB)
    assert "org/other" in both.recipe and "context: 512" in both.recipe and "weight_format: [f16]" in both.recipe
    assert [one.why for one in both.flags].count("given again later") == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "no launch line of vllm"),
        ("vllm bench serve --model x", "no launch line of vllm: it begins with vllm serve, python -m vllm.entrypoints"),
        ("vllm serve", "names no model"),
        ("vllm serve 'x", "cannot be read"),
        ("vllm serve x && rm y", "give the server's command alone"),
        ("vllm serve x --port", "--port has no value"),
    ],
)
def test_what_is_no_launch_line_is_told(line: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        vllm(line)


def test_the_command_writes_the_recipe_and_says_what_was_refused(tmp_path: Path) -> None:
    assert set(NAMES) == set(SERVERS)
    out, config = tmp_path / "made.yaml", tmp_path / "conf.yaml"
    done = llmbuild("convert", "vllm", "vllm serve org/m --max-model-len 128 --enable-lora", "-o", out)
    assert done.returncode == 2
    assert done.stdout == "llmbuild serve m --port 8000\n" and read_recipe(out).context == 128
    assert "refused  --enable-lora" in done.stderr and "1 of 3 flags are refused" in done.stderr
    config.write_text("model-path: org/m\ntp: 1\n")
    told = CliRunner().invoke(main.commands["convert"], ["sglang", str(config), "--json"], standalone_mode=False)
    made = json.loads(told.stdout)
    assert told.return_value == 0 and made["serve"] == "llmbuild serve m --port 30000"
    assert {one["flag"]: one["kind"] for one in made["flags"]} == {"model-path org/m": "mapped", "tp 1": "moot"}
    again = llmbuild("convert", "vllm", "vllm serve org/m", "-o", out)
    assert again.returncode == 2 and "is there already" in again.stderr
    config.write_text("- a\n")
    assert "no configuration" in llmbuild("convert", "vllm", config).stderr

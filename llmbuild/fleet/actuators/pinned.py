"""Pins this process to cores, then runs a module in it: all of its threads are pinned from their beginning.

    start.py pinned.py CORE[,CORE]... MODULE|SCRIPT.py [ARGUMENT]...

A script for `llmbuild.process.start`; it imports nothing but what runs it.
"""

from __future__ import annotations

import os
import sys

from llmbuild.process.start import launch

if __name__ == "__main__":
    os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
    launch(sys.argv[2:])

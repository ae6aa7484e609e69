"""Interpreted tests need a process of their own; `test_interpreted.py` starts it."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

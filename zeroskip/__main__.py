"""`python -m zeroskip` is the command `zeroskip`."""

from __future__ import annotations

from zeroskip.cli import main

if __name__ == "__main__":
    main()

"""`python -m expertsteer_lens`: the command line."""

from __future__ import annotations

from expertsteer_lens.cli import main

if __name__ == "__main__":
    main()

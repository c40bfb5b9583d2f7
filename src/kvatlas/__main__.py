"""``python -m kvatlas``."""

from __future__ import annotations

from kvatlas.cli.main import main

if __name__ == "__main__":
    main()

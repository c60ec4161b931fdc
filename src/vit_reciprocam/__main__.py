"""`python -m vit_reciprocam` is the `vit-reciprocam` command."""

from __future__ import annotations

if __name__ == "__main__":
    from vit_reciprocam.cli import main

    main()

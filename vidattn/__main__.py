"""Runs the command line: ``python -m vidattn`` is the command ``vidattn``."""

import sys

from vidattn.cli import main

sys.exit(main())

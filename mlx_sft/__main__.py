"""The command line: the script `mlx-sft`, and `python -m mlx_sft` where that is not on the path."""

from __future__ import annotations

from mlx_sft.crash_report import command_line


def main() -> None:
    """Run a command. The libraries that it needs take a second or more to import, in which Ctrl-C ends it in words, too."""
    with command_line():
        from mlx_sft.cli import main as commands

        commands(prog_name="mlx-sft")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""
``optimum-cli nm-permute``: the command ``nm-permute`` under optimum's.

The wheel holds this file as ``optimum/commands/register/register_nm_permute.py``, where
``optimum-cli`` looks for commands. It is imported whatever the command is, and so imports
nothing heavy.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class NMPermuteCommand(BaseOptimumCLICommand):
    """Hands every word over, options too, and so knows all commands there are."""

    COMMAND = CommandInfo(
        name="nm-permute",
        help="Prune N:M (2:4) and lose less: prune, evaluate, verify, convert, ...",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take all words as they are: without prefixes no word is an option here."""
        parser.prefix_chars = ""
        parser.add_argument("words", nargs=REMAINDER)

    def run(self) -> None:
        """Run ``nm-permute`` with the words, which ends the process."""
        from nm_permute_plugin.cli.app import app

        app(self.args.words, prog_name="optimum-cli nm-permute")


REGISTER_COMMANDS = [NMPermuteCommand]

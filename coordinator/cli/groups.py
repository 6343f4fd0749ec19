"""A group of commands that lists what there is when it is called without one."""

import click


class ListingGroup(click.Group):
    """A group whose command `list` is what it does when no command is named.

    All options belong to the commands, so that none can be given to the group and then be passed over.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `list` before options that no command precedes."""
        asks_for_help = bool(args) and args[0] in self.get_help_option_names(ctx)
        if not ctx.resilient_parsing and not asks_for_help and (not args or args[0].startswith("-")):
            args = ["list", *args]
        return super().parse_args(ctx, args)

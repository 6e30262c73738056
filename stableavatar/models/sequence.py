"""The tokens of a forward that are computed here: all of them, unless a driver gives the model another `WholeSequence`."""

from torch import Tensor

from stableavatar.models.layout import TokenLayout
from stableavatar.models.rope import Rotary


class WholeSequence:
    """Every token is computed here."""

    def shard(self, x: Tensor, layout: TokenLayout, rotary: Rotary) -> tuple[Tensor, TokenLayout, Rotary]:
        """What the blocks work on.

        Args:
            x: all tokens [B, F, S, D].
            layout, rotary: of all of them.
        """
        return x, layout, rotary

    def gather(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """All tokens of the output [B, F, S, C] from those computed here.

        Args:
            layout: as `shard` gave it.
        """
        return x


WHOLE_SEQUENCE = WholeSequence()

"""One exchange between devices within a step, and the seconds that it takes on a ring."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """A collective operation of a program.

    Attributes:
        kind: all-reduce, all-gather, reduce-scatter, all-to-all, ragged-all-to-all or
            collective-permute, as XLA names them.
        nbytes: bytes of the largest operand or result of one device.
        devices: number of devices that exchange with each other.
        moves_weights: only values computed from parameters travel.
    """

    kind: str
    nbytes: int
    devices: int
    moves_weights: bool

    def seconds(self, bandwidth: float, latency: float) -> float:
        """Seconds on a ring of `bandwidth` bytes a second, with `latency` seconds for each hop.

        On a ring every device passes on the data of each other device once; twice for an
        all-reduce, which is a reduce-scatter followed by an all-gather.
        """
        if self.kind == "collective-permute":
            return self.nbytes / bandwidth + latency
        rounds = 2 if self.kind == "all-reduce" else 1
        passed_bytes = rounds * self.nbytes * (self.devices - 1) / self.devices
        # Data travels in both directions, so the farthest device is half the ring away.
        hops = rounds * (self.devices // 2)
        return passed_bytes / bandwidth + hops * latency

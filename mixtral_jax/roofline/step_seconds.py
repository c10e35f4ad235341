"""The seconds of a step, by what they are spent on, and what launching it costs the host."""

from dataclasses import dataclass

# Seconds that the host needs to launch one compiled program, for each array that is given to it:
# 0.09 ms for 392 arrays on one device, 0.19 ms under eight (measured on two cores of an EPYC).
_OF_ARGUMENT = 0.23e-6
_OF_FURTHER_DEVICE = 0.0365e-6
_DEVICES_OF_HOST = 8  # a host launches on its own devices only


@dataclass(frozen=True, kw_only=True)
class EstimatedSeconds:
    """Estimated seconds of one step, by what they are spent on.

    Memory and compute overlap; the network does not overlap with them. The host launches a step
    while the devices still compute the one before it, so a step takes as long as the slower of the
    two: launching bounds small models only. It is not added, but where a row has a grammar, whose
    mask the second program of a step waits for.
    """

    memory: float
    compute: float
    network: float
    launch: float = 0.0

    @property
    def devices(self) -> float:
        """Seconds that the devices work."""
        return max(self.memory, self.compute) + self.network

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return max(self.devices, self.launch)

    @property
    def bound(self) -> str:
        """The largest of memory, compute, network and launch, by name.

        Launching is it only where the devices wait for it.
        """
        if self.launch > self.devices:
            return "launch"
        seconds = {"memory": self.memory, "compute": self.compute, "network": self.network}
        return max(seconds, key=lambda name: seconds[name])


def launch_seconds(arguments: int, devices: int) -> float:
    """Seconds that the host needs to launch one program.

    Args:
        arguments: number of arrays that are given to it.
        devices: number of devices of all hosts together, at most eight of each host.
    """
    further = min(devices, _DEVICES_OF_HOST) - 1
    return arguments * (_OF_ARGUMENT + further * _OF_FURTHER_DEVICE)

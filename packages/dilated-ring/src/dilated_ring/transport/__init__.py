"""How tensors get from one rank to another."""

from dilated_ring.transport.contract import Pending, Transport
from dilated_ring.transport.distributed import DistributedTransport
from dilated_ring.transport.in_process import InProcessTransport

__all__ = ["DistributedTransport", "InProcessTransport", "Pending", "Transport"]

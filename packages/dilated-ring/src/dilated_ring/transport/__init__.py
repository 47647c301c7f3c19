"""How tensors get from one rank to another, and what happens when a rank fails."""

from dilated_ring.transport.agreement import check_agreement
from dilated_ring.transport.contract import Pending, Transport
from dilated_ring.transport.distributed import DistributedTransport
from dilated_ring.transport.errors import DisagreementError, RankFailure
from dilated_ring.transport.faults import reporting_failures
from dilated_ring.transport.in_process import InProcessTransport

__all__ = [
    "DisagreementError",
    "DistributedTransport",
    "InProcessTransport",
    "Pending",
    "RankFailure",
    "Transport",
    "check_agreement",
    "reporting_failures",
]

"""Ray's private autoscaler, which says of a cluster file what `ray up` would do: the only test file that imports it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ray.autoscaler._private.node_provider_availability_tracker import (
    NodeAvailabilityRecord,
    NodeAvailabilitySummary,
    UnavailableNodeInformation,
)
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config as prepare_config
from ray.autoscaler._private.util import validate_config as validate_config


def started_nodes(types: dict[str, Any], demands: Sequence[dict[str, float]], refused: Sequence[str] = ()) -> dict[str, int]:
    """Type -> how many nodes the autoscaler starts for `demands` beside the head, where the cloud has refused some."""
    reason = UnavailableNodeInformation("InsufficientInstanceCapacity", "")
    availability = NodeAvailabilitySummary({kind: NodeAvailabilityRecord(kind, False, 0.0, reason) for kind in refused})
    scorer = partial(_default_utilization_scorer, node_availability_summary=availability)
    nodes, _ = get_nodes_for(types, {"head": 1}, "head", 10, demands, scorer)
    return dict(nodes)

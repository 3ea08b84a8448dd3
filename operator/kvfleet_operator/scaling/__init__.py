"""The autoscaler at work: the decisions of `autoscale`, fed from the world and brought about.

- `pools`: which pools of the world are scaled, and who can be asked about them. Pure.
- `effects`: the workload's `replicas`, victims' marks, status and Events.
- `loop`: one round after another.
"""

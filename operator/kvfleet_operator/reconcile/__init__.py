"""Pure reconciliation: objects as read → objects as wanted + status. No I/O, no clock of its own.

One module per kind (`modelpool`, `fleetrouter`, `routingpolicy`, `acceleratorprofile`), each with `children(...)`
(the wanted objects) and `status(...)` (the status to report once they were applied). `conditions` keeps transition
times stable, `names` says what things are called, `podtemplate` merges a user's partial template over the generated
one, `drift` compares a live object with the wanted one, `dependents` says what to look at again after a change.
"""

from kvfleet_operator.reconcile.plan import Applied, Manifest, Plan, Rejection

__all__ = ["Applied", "Manifest", "Plan", "Rejection"]

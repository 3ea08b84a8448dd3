"""Several routers before the same workers, and the messages between them as a list that tests may lose, repeat and garble."""

from routing_fleet import Fleet

from kvfleet_router.core.sharing import Sharing


class Replica(Fleet):
    """A fleet whose router tells others."""

    def __init__(self, identity, *, now=100.0, **fields):
        super().__init__(**fields)
        self.now = now
        self.sharing = Sharing(self.dispatcher, clock=lambda: self.now, identity=identity)

    def hear(self, *messages):
        for message in messages:
            self.sharing.hear(message)
        self.sharing.apply()

    def elsewhere(self, name="pool-0"):
        """What it believes others have in flight there."""
        return self.worker(name).elsewhere


def replicas(count, **fields):
    return [Replica(number + 1, **fields) for number in range(count)]


def exchange(*group, rounds=1):
    """Everybody tells everybody else what there is to tell."""
    for _ in range(rounds):
        told = [replica.sharing.flush() for replica in group]
        for messages in told:
            for replica in group:
                replica.hear(*messages)


def passes(seconds, *group, step=0.05):
    """Time goes by, with exchanges."""
    for _ in range(round(seconds / step)):
        for replica in group:
            replica.now += step
        exchange(*group)

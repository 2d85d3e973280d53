"""The policies there are, by the names that the config knows."""

from __future__ import annotations

from cluster.router.policy import filters, pickers, scorers, walks
from cluster.router.policy.contracts import Profile

EVERYBODY = 24  # members that qualify after which no more are looked at: a group of up to so many is seen whole

FILTERS = (
    filters.SERVES_MODEL,
    filters.SESSION_UP,
    filters.NOT_DRAINING,
    filters.SAME_CHECKPOINT,
    filters.NOT_REFUSED,
    filters.HAS_ROOM,
    filters.NOT_EJECTED,
    filters.NOT_SLOW,
    filters.NOT_FAILED,
    filters.NOT_FULL,
)

ROUND_ROBIN = Profile(
    name="round_robin", filters=FILTERS, scorers=((scorers.TURN, 1.0),), picker=pickers.best, walk=walks.in_turn,
    enough=1,
)  # fmt: skip
LEAST_LOAD = Profile(
    name="least_load", filters=FILTERS, scorers=((scorers.LEAST_LOAD, 1.0),), picker=pickers.best,
    walk=walks.at_random, enough=EVERYBODY,
)  # fmt: skip
POWER_OF_TWO = Profile(
    name="power_of_two", filters=FILTERS, scorers=((scorers.LEAST_LOAD, 1.0),), picker=pickers.best,
    walk=walks.at_random, enough=2,
)  # fmt: skip
PREFIX_AWARE = Profile(
    name="prefix_aware", filters=FILTERS, scorers=((scorers.CACHED_PREFIX, 1.0), (scorers.SHORT_QUEUE, 1.0)),
    picker=pickers.best, walk=walks.holders_first, enough=EVERYBODY, uses_blocks=True,
)  # fmt: skip
SESSION = Profile(
    name="session", filters=FILTERS, scorers=((scorers.RING, 1.0),), picker=pickers.best, walk=walks.round_the_ring,
    enough=1,
)  # fmt: skip
# What prefix_aware counts, and two things that it does not: a prompt that is computed delays those behind it as well,
# so that a cached token is worth two; and routers that know nothing of each other should begin a new prompt's cache
# at one place, and spread prompts that come at one moment.
DEFAULT = Profile(
    name="default", filters=FILTERS,
    scorers=((scorers.CACHED_PREFIX, 2.0), (scorers.SHORT_QUEUE, 1.0), (scorers.AT_HOME, 0.1)),
    picker=pickers.best, walk=walks.holders_first, enough=EVERYBODY, uses_blocks=True, uses_homes=True,
)  # fmt: skip

PROFILES = {
    profile.name: profile for profile in (ROUND_ROBIN, LEAST_LOAD, POWER_OF_TWO, PREFIX_AWARE, SESSION, DEFAULT)
}

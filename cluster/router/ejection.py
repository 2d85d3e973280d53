"""Which endpoints get nothing for a while because their transport failed. Pure: the time is an argument.

Every endpoint has a circuit of its own: closed -> open for a while that doubles with every failure -> half open,
where one request may go as a probe -> closed when the probe gets a token, open again when the endpoint fails.
Only what ``failed`` is told counts: a broken, silent or stuck session. What an engine answers never does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.domain.ids import Incarnation


@dataclass(frozen=True, slots=True)
class EjectionRules:
    """Times in seconds."""

    first_s: float = 1.0  # how long the first failure ejects; the next ones twice as long each
    longest_s: float = 30.0
    forgotten_s: float = 60.0  # so long after a failure, the next one counts as the first
    probe_s: float = 10.0  # a probe without a token by then is forgotten, and another one may go


@dataclass(slots=True)
class _Circuit:
    """Of one endpoint that has failed. ``probe_until_s`` is None when no probe is on its way."""

    failures: int = 0
    failed_s: float = 0.0
    until_s: float = 0.0
    probe_until_s: float | None = None
    up: bool = False

    def closes_at(self) -> float:
        """Until then nothing goes there."""
        return self.until_s if self.probe_until_s is None else max(self.until_s, self.probe_until_s)


@dataclass(slots=True)
class _Model:
    """The endpoints of one model: those that are up, and the circuits of those that are not trusted."""

    up: set[Incarnation] = field(default_factory=set)
    open: dict[Incarnation, _Circuit] = field(default_factory=dict)
    ejected: frozenset[Incarnation] = frozenset()
    valid_until_s: float = 0.0  # when ``ejected`` is to be decided anew; any event does so at once


class Ejections:
    """The circuits of all endpoints.

    Of a model's endpoints that are up, at most half are ejected at any time, those that failed most; so the last one
    never is. An endpoint that is down counts on neither side: nothing can go there anyway.
    """

    def __init__(self, rules: EjectionRules | None = None) -> None:
        self._rules = rules or EjectionRules()
        self._models: dict[str, _Model] = {}
        self.open: set[Incarnation] = set()  # whose circuits are not closed; for whoever asks to read
        self._past: dict[Incarnation, _Circuit] = {}  # those that failed and may fail again

    def came_up(self, incarnation: Incarnation) -> None:
        model = self._models.setdefault(incarnation.replica.model, _Model())
        model.up.add(incarnation)
        model.valid_until_s = 0.0
        circuit = model.open.get(incarnation)
        if circuit is not None:
            circuit.up = True

    def went_down(self, incarnation: Incarnation) -> None:
        """Without a verdict; ``failed`` says that it was its transport's fault."""
        model = self._models.get(incarnation.replica.model)
        if model is None:
            return
        model.up.discard(incarnation)
        model.valid_until_s = 0.0
        circuit = model.open.get(incarnation)
        if circuit is not None:
            circuit.up = False

    def left(self, incarnation: Incarnation) -> None:
        """It is in the endpoint table no more: nothing is remembered of it."""
        self.went_down(incarnation)
        self._past.pop(incarnation, None)
        self.open.discard(incarnation)
        model = self._models.get(incarnation.replica.model)
        if model is not None:
            model.open.pop(incarnation, None)
            if not model.up and not model.open:
                del self._models[incarnation.replica.model]

    def failed(self, incarnation: Incarnation, now_s: float) -> None:
        """Its transport failed: it is ejected, for twice as long as the last time unless that is long ago."""
        rules, model = self._rules, self._models.setdefault(incarnation.replica.model, _Model())
        circuit = self._past.setdefault(incarnation, _Circuit())
        if circuit.failures and now_s - circuit.failed_s > rules.forgotten_s:
            circuit.failures = 0
        circuit.failures += 1
        circuit.failed_s = now_s
        # The exponent is bounded as well as the time: failures may go on for ever.
        circuit.until_s = now_s + min(rules.longest_s, rules.first_s * 2.0 ** min(circuit.failures - 1, 30))
        circuit.probe_until_s = None
        circuit.up = incarnation in model.up
        model.open[incarnation] = circuit
        self.open.add(incarnation)
        model.valid_until_s = 0.0

    def picked(self, incarnation: Incarnation, now_s: float) -> bool:
        """A request goes there; on a half-open circuit it is the probe, and the only one for now. Whether it is."""
        model = self._models.get(incarnation.replica.model)
        circuit = None if model is None else model.open.get(incarnation)
        if model is not None and circuit is not None and now_s >= circuit.closes_at():
            circuit.probe_until_s = now_s + self._rules.probe_s
            model.valid_until_s = 0.0
            return True
        return False

    def unpicked(self, incarnation: Incarnation) -> None:
        """The probe was not sent after all: the next request is."""
        model = self._models.get(incarnation.replica.model)
        circuit = None if model is None else model.open.get(incarnation)
        if model is not None and circuit is not None:
            circuit.probe_until_s = None
            model.valid_until_s = 0.0

    def delivered(self, incarnation: Incarnation, now_s: float) -> None:
        """A token came from there: whoever is not ejected for time's sake any more is trusted again."""
        model = self._models.get(incarnation.replica.model)
        circuit = None if model is None else model.open.get(incarnation)
        if model is not None and circuit is not None and now_s >= circuit.until_s:
            del model.open[incarnation]
            self.open.discard(incarnation)
            model.valid_until_s = 0.0

    def suspected(self, incarnation: Incarnation) -> bool:
        """Whether ``delivered`` and ``picked`` would change anything: the circuit is not closed."""
        return incarnation in self.open

    def ejected(self, incarnation: Incarnation, now_s: float) -> bool:
        """Whether nothing new should go there now."""
        if incarnation not in self.open:
            return False
        model = self._models[incarnation.replica.model]
        if now_s >= model.valid_until_s:
            self._decide(model, now_s)
        return incarnation in model.ejected

    def _decide(self, model: _Model, now_s: float) -> None:
        """Who is ejected from now until ``valid_until_s``; takes as long as there are circuits that are not closed."""
        closed_to_work = [(i, c) for i, c in model.open.items() if now_s < c.closes_at()]
        down = {incarnation for incarnation, circuit in closed_to_work if not circuit.up}
        up = [(i, c) for i, c in closed_to_work if c.up]
        up.sort(key=lambda entry: (-entry[1].failures, -entry[1].failed_s, entry[0]))
        model.ejected = frozenset(down.union(i for i, _ in up[: len(model.up) // 2]))
        model.valid_until_s = min((c.closes_at() for _, c in closed_to_work), default=float("inf"))

"""The rendered chart as running pods: its own commands, probes, hooks, users, files and ports, without a cluster.

Needs root and iproute2; says so and skips where it cannot have them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from chart_harness import NEW, component, config_file, merged, of_kind, one, pods, render
from host_namespaces import WHY_NOT, can_make_namespaces
from network_policies import dropped, enforce, nft
from pod_sandbox import Container, Json, Node, Pod, Prober
from resident_command import ResidentCommand

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

RELEASE = "llm"
READY_DEADLINE_S = 240
PROMPT, MAX_TOKENS = "Return the ", 400  # so long that `status`, a process of its own, sees it run
VALUES = {
    "auth": {"token": "0123456789abcdef0123456789abcdef"},
    "models": [{"model": "demo", "replicas": 1, "tensor_parallel_size": 2}],
    "workers": [{"name": "cpu", "replicas": 1, "deviceKind": "cpu", "devicesPerPod": 2}],
    "router": {"replicas": 1},
    "metrics": {kind: {"enabled": True} for kind in ("serviceMonitor", "podMonitor")},
}
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, timeout_s: float) -> int:
    """The status; 0 when nobody answers."""
    try:
        return int(DIRECT.open(url, timeout=timeout_s).status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except OSError:
        return 0


def text_of(url: str) -> str:
    with DIRECT.open(url, timeout=10) as answer:
        return str(answer.read().decode())


class Deployment:
    """The chart's pods on one node: the controller, one worker, one router; the test's pod is not started."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.asked = ResidentCommand("ip", "netns", "exec", node.name)
        self.objects = render(VALUES, name=RELEASE, kube_version=NEW)
        templates = {component(pod): pod for _, pod in pods(self.objects)}
        self.pods = {part: node.add(f"{RELEASE}-{part}", templates[part], self.objects) for part in sorted(templates)}
        for service in of_kind(self.objects, "Service"):
            (pod,) = [p for p in self.pods.values() if service["spec"]["selector"].items() <= p.labels.items()]
            node.hosts[service["metadata"]["name"]] = pod.address
        self.policed = nft() is not None
        if self.policed:
            enforce(of_kind(self.objects, "NetworkPolicy"), node)
        self.running = {part: self._start(part) for part in ("controller", "worker", "router")}

    def _start(self, part: str) -> Container:
        (container,) = self.pods[part].start()
        return container

    def status(self) -> Json:
        controller = f"{self.pods['controller'].address}:50052"
        return json.loads(self.asked.answer(["status", "--json", "--controller", controller]))

    def stream(self) -> subprocess.Popen[str]:
        """A client's long completion, on its way."""
        address = f"--address={self.pods['router'].address}:50051"
        client = ["ip", "netns", "exec", self.node.name, sys.executable, "-m", "cluster", "generate", PROMPT, address]
        options = [f"--max-tokens={MAX_TOKENS}", "--ignore-eos", "--json"]
        return subprocess.Popen([*client, *options], stdout=subprocess.PIPE, text=True)

    def story(self, prober: Prober) -> str:
        said = "\n".join(f"--- {part}: {one.said()}" for part, one in self.running.items())
        return f"{prober.story}\n{said}"


def until(what: Callable[[], bool], deadline_s: float, told: Callable[[], object]) -> None:
    end, pause = time.monotonic() + deadline_s, threading.Event()
    while not what():
        assert time.monotonic() < end, told()
        pause.wait(0.2)


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    if not can_make_namespaces():
        pytest.skip(f"the chart's pods were not run: {WHY_NOT}")
    try:
        node = Node()
    except FileNotFoundError as error:
        pytest.skip(f"the chart's pods were not run: {error}")
    with node:
        running = Deployment(node)
        yield running
        running.asked.close()


def allowed_ports(objects: list[Json], pod: Pod) -> list[range]:
    """What the rendered NetworkPolicies let in, from anywhere."""
    found = []
    for policy in of_kind(objects, "NetworkPolicy"):
        if policy["spec"]["podSelector"]["matchLabels"].items() <= pod.labels.items():
            for rule in policy["spec"].get("ingress", []):
                found += [range(port["port"], port.get("endPort", port["port"]) + 1) for port in rule["ports"]]
    return found


def test_the_rendered_pods_serve_and_end_as_written(deployment: Deployment) -> None:
    running, node = deployment.running, deployment.node
    with Prober(node, list(running.values()), get) as prober:
        until(
            lambda: prober.ready or bool(prober.killed) or not all(c.runs for c in running.values()),
            READY_DEADLINE_S,
            lambda: deployment.story(prober),
        )
        assert prober.ready, deployment.story(prober)

        check_test_pod(deployment)
        check_users(deployment)
        check_metrics(deployment)
        check_ports(deployment)
        check_edges(deployment)
        assert prober.killed == [], prober.story
        for container in running.values():
            prober.leave(container)
    check_drain(deployment)
    check_config_follows(deployment)
    check_ends(deployment)


def check_test_pod(deployment: Deployment) -> None:
    """What `helm test` runs."""
    for container in deployment.pods["test"].start():
        assert container.exit_code(120) == 0, container.said()
        assert len(container.said().strip()) > 0


def check_users(deployment: Deployment) -> None:
    """Nobody became somebody else, or got a capability back."""
    for part, container in deployment.running.items():
        probe = container.execute(["cat", "/proc/1/status"], 20)
        fields = dict(line.split(":\t", 1) for line in probe.stdout.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == ["10001"] * 4, part
        assert {fields[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {"0" * 16}, part
        assert fields["NoNewPrivs"] == "1", part
        assert container.execute(["touch", "/made"], 20).returncode != 0, "the root filesystem is read-only"


def check_metrics(deployment: Deployment) -> None:
    """Every port that the monitors name is of a container; the process's own answers, and each rank's one of the rest."""
    named = {endpoint["port"] for endpoint in one(deployment.objects, "PodMonitor")["spec"]["podMetricsEndpoints"]}
    worker = deployment.running["worker"]
    ports = {port["name"]: port["containerPort"] for port in worker.spec["ports"]}
    assert named <= ports.keys()
    assert {name for name in ports if name.startswith("metrics")} == named
    answers = {name: deployment.node.inside(get, url_of(worker, ports[name]), 5) for name in named}
    assert answers["metrics"] == 200
    ranks = [name for name, status in answers.items() if status == 200 and name != "metrics"]
    assert len(ranks) == 2, answers
    for name in ranks:
        assert "# TYPE cluster_" in deployment.node.inside(text_of, url_of(worker, ports[name]))
    (endpoint,) = one(deployment.objects, "ServiceMonitor")["spec"]["endpoints"]
    for part in ("controller", "router"):
        (service,) = [s for s in of_kind(deployment.objects, "Service") if component(s) == part]
        (port,) = [port["port"] for port in service["spec"]["ports"] if port["name"] == endpoint["port"]]
        assert "# TYPE cluster_" in deployment.node.inside(text_of, url_of(deployment.running[part], port))


def url_of(container: Container, port: int) -> str:
    return f"http://{container.pod.address}:{port}/metrics"


def check_ports(deployment: Deployment) -> None:
    """Nothing listens for others but where a NetworkPolicy lets somebody in."""
    for part in deployment.running:
        pod = deployment.pods[part]
        allowed = allowed_ports(deployment.objects, pod)
        assert allowed
        strays = {port for port in pod.listening() if not any(port in ports for ports in allowed)}
        assert not strays, part


def check_edges(deployment: Deployment) -> None:
    """All of the above went over edges that the policies open, and over those alone: nobody knocked elsewhere."""
    if not deployment.policed:
        return  # no nftables here; `check_ports` has compared the listeners
    assert {part: dropped(pod) for part, pod in deployment.pods.items()} == {
        part: {"input": 0, "output": 0} for part in deployment.pods
    }
    ray = f"{deployment.pods['controller'].address} 6379"
    assert knock(deployment.running["worker"], ray), "a worker joins Ray"
    assert not knock(deployment.running["router"], ray), "a router has no business with Ray"
    assert dropped(deployment.pods["router"])["output"] > 0


def knock(container: Container, target: str) -> bool:
    """Whether a TCP connection from inside is taken."""
    program = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
    return container.execute(["python", "-c", program, *target.split()], 30).returncode == 0


def check_drain(deployment: Deployment) -> None:
    """The worker's preStop returns when the running stream has ended whole, and nothing runs there any more."""
    with deployment.stream() as reference:
        expected = json.loads(reference.communicate(timeout=120)[0])
    worker = deployment.running["worker"]
    hook = worker.spec["lifecycle"]["preStop"]["exec"]["command"]
    with deployment.stream() as stream:
        until(lambda: busy(deployment), 60, deployment.status)
        done = worker.execute(hook, float(deployment.pods["worker"].spec["terminationGracePeriodSeconds"]))
        assert done.returncode == 0, done.stderr
        assert stream.poll() is not None or stream.wait(5) == 0, "the hook returned before the stream ended"
        answer = json.loads(stream.stdout.read())
    assert stream.returncode == 0
    assert answer["text"] == expected["text"]
    assert answer["finish_reason"] == expected["finish_reason"]
    ready = [replica for replica in deployment.status()["replicas"] if replica["phase"] == "READY"]
    assert ready == []


def busy(deployment: Deployment) -> bool:
    return any(replica["activity"]["running_sequences"] > 0 for replica in deployment.status()["replicas"])


def check_config_follows(deployment: Deployment) -> None:
    """A changed ConfigMap reaches the running controller."""
    objects = render(merged(VALUES, {"models": [{**VALUES["models"][0], "replicas": 0}]}), name=RELEASE)
    assert [model["desired_replicas"] for model in deployment.status()["models"]] == [1]
    deployment.pods["controller"].change_config("config", {"cluster.yaml": config_file(objects)})
    until(lambda: deployment.status()["models"][0]["desired_replicas"] == 0, 30, deployment.status)


def check_ends(deployment: Deployment) -> None:
    """preStop and SIGTERM end every pod well, long before somebody kills it."""
    for part in ("worker", "router", "controller"):
        seconds, code = deployment.running[part].terminate()
        assert code == 0, (part, seconds, deployment.running[part].said())

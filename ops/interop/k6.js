// What grpc-go, inside k6, sees of a router: k6 run -e ADDRESS=... -e PROTOS=... k6.js
// Prints JSON lines (--log-format raw): what is due, {"due": [...]}, and per case {"case": ..., "error": null or why}.
// What the mock replica generates is told by the prompt, "PACE_MS DELAY_MS" (ops/bench/router/mock_replica.py).
import grpc from "k6/net/grpc";
import exec from "k6/execution";

const client = new grpc.Client();
client.load([__ENV.PROTOS], "cluster/v1/inference.proto");
const SERVICE = "cluster.v1.Inference";
const CROWD = { users: 20, times: 5 };
export const options = {
  // One user each: what they do at the same time shares nothing but the router.
  scenarios: {
    cases: { executor: "per-vu-iterations", vus: 1, iterations: 1, exec: "cases", maxDuration: "90s" },
    crowd: { executor: "per-vu-iterations", vus: CROWD.users, iterations: CROWD.times, exec: "crowd", maxDuration: "90s" },
  },
};

const request = (tokens, pace = 0, more = {}) => Object.assign({ text: `${pace} 0`, sampling: { max_tokens: tokens } }, more);

function same(found, expected, what) {
  if (found !== expected) throw new Error(`${what}: ${JSON.stringify(found)} in place of ${JSON.stringify(expected)}`);
}

function complete(asked, status = grpc.StatusOK, parameters = { timeout: "20s" }) {
  const found = client.invoke(`${SERVICE}/Complete`, asked, parameters);
  if (found.status !== status) throw new Error(`status ${found.status}: ${found.error && found.error.message}`);
  return found.message;
}

function stream(asked, parameters = {}) {
  return new Promise((resolve, reject) => {
    const found = { text: "", chunks: 0, end: null };
    const call = new grpc.Stream(client, `${SERVICE}/Generate`, parameters);
    call.on("data", ({ chunk, end }) => {
      if (chunk) [found.text, found.chunks] = [found.text + chunk.text, found.chunks + 1];
      if (end) found.end = end;
    });
    call.on("error", (error) => reject(Object.assign(new Error(error.message), { code: error.code, found })));
    call.on("end", () => resolve(found));
    call.write(asked);
    call.end();
  });
}

const all = {
  async answer() {
    const found = complete(request(20));
    same(found.finishReason, "FINISH_REASON_LENGTH", "finish reason");
    same(found.usage.generatedTokens, 20, "tokens");
  },
  async stream() {
    const found = await stream(request(40, 10));
    same(found.text, complete(request(40)).text, "text");
    same(found.end.usage.generatedTokens, 40, "tokens");
  },
  async many_streams_on_one_connection() {
    const { text } = complete(request(200));
    for (const found of await Promise.all(Array.from({ length: 50 }, () => stream(request(200))))) same(found.text, text, "text");
  },
  async many_answers_one_by_one() {
    for (let i = 0; i < 300; ++i) same(complete(request(1)).usage.generatedTokens, 1, "tokens");
  },
  async long_request() {
    const ids = Array.from({ length: 300000 }, () => 20);
    same(complete({ tokenIds: { ids }, sampling: { maxTokens: 1 } }).usage.promptTokens, 300000, "prompt");
  },
  async long_stream() {
    same((await stream(request(20000))).text, complete(request(20000)).text, "text");
  },
  async unknown_model() {
    complete(request(1, 0, { model: "nobody" }), grpc.StatusNotFound);
  },
  async invalid() {
    complete({ text: "0 0", sampling: { max_tokens: 1, top_p: 7 } }, grpc.StatusInvalidArgument);
  },
  async deadline() {
    complete(request(1000, 30), grpc.StatusDeadlineExceeded, { timeout: "500ms" });
    same(complete(request(5)).usage.generatedTokens, 5, "tokens");
  },
  async metadata() {
    const metadata = { "x-tenant": "blue", long: "x".repeat(4000) };
    same(complete(request(1), grpc.StatusOK, { metadata }).usage.generatedTokens, 1, "tokens");
  },
  async reflection() {
    client.close();
    client.connect(__ENV.ADDRESS, { plaintext: true, reflect: true });
    same(client.invoke("grpc.health.v1.Health/Check", {}).message.status, "SERVING", "health");
    same(client.invoke("cluster.v1.Inference/ListModels", {}).status, grpc.StatusOK, "status");
  },
};

function connect() {
  client.connect(__ENV.ADDRESS, { plaintext: true, timeout: "10s" });
}

function tell(name, error) {
  console.log(JSON.stringify({ case: name, error: error === null ? null : String(error) }));
}

export async function cases() {
  connect();
  for (const [name, run] of Object.entries(all)) {
    let error = null;
    try {
      await run();
    } catch (found) {
      error = found;
    }
    tell(name, error);
  }
  client.close();
}

export function setup() {
  const each = Array.from({ length: CROWD.users * CROWD.times }, (_, index) => `crowd ${index + 1}`);
  console.log(JSON.stringify({ due: [...Object.keys(all), ...each] }));
}

export function crowd() {
  let error = null;
  try {
    connect();
    for (let i = 0; i < 20; ++i) same(complete(request(3)).usage.generatedTokens, 3, "tokens");
  } catch (found) {
    error = found;
  }
  tell(`crowd ${exec.scenario.iterationInTest + 1}`, error);
  client.close();
}

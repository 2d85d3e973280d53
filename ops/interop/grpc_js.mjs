// What @grpc/grpc-js, the gRPC library of Node, sees of a router: node grpc_js.mjs ADDRESS PROTOS CASE...
// Prints a JSON line with what is due, {"due": [...]}, and one per case, {"case": ..., "error": null or why}. What the mock replica generates is told by the prompt,
// "PACE_MS DELAY_MS" (ops/bench/router/mock_replica.py).
import { createRequire } from "node:module";
import { performance } from "node:perf_hooks";

const [, , address, protos, ...wanted] = process.argv;
const require = createRequire(`${process.env.NODE_PATH ?? process.cwd()}/`);
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const loaded = loader.loadSync("cluster/v1/inference.proto", { includeDirs: [protos], keepCase: true, enums: String, oneofs: true });
const { Inference } = grpc.loadPackageDefinition(loaded).cluster.v1;

const connect = (options = {}) =>
  new Inference(address, grpc.credentials.createInsecure(), { "grpc.use_local_subchannel_pool": 1, ...options });
const request = (tokens, pace_ms = 0, more = {}) => ({ text: `${pace_ms} 0`, sampling: { max_tokens: tokens }, ...more });
const deadline = (ms) => ({ deadline: Date.now() + ms });
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function check(condition, what) {
  if (!condition) throw new Error(what);
}

function same(found, expected, what) {
  check(found === expected, `${what}: ${JSON.stringify(found)} in place of ${JSON.stringify(expected)}`);
}

const complete = (client, asked, options = deadline(20_000), metadata = new grpc.Metadata()) =>
  new Promise((resolve, reject) => {
    let initial;
    const call = client.Complete(asked, metadata, options, (error, answer) =>
      error ? reject(error) : resolve({ ...answer, initial }),
    );
    call.on("metadata", (found) => (initial = found));
  });

const stream = (client, asked, { options = deadline(20_000), each = () => {} } = {}) =>
  new Promise((resolve, reject) => {
    const found = { text: "", chunks: 0, end: null };
    const call = client.Generate(asked, new grpc.Metadata(), options);
    call.on("data", ({ chunk, end }) => {
      if (chunk) [found.text, found.chunks] = [found.text + chunk.text, found.chunks + 1];
      if (end) found.end = end;
      each(call, found);
    });
    call.on("error", (error) => reject(Object.assign(error, { found })));
    call.on("end", () => resolve(found));
  });

async function refused(promise, ...codes) {
  try {
    await promise;
  } catch (error) {
    check(codes.includes(error.code), `${grpc.status[error.code]}: ${error.details}`);
    check(error.details.length > 0, "a status without a text");
    return error;
  }
  throw new Error(`it was answered in place of ${codes.map((code) => grpc.status[code])}`);
}

const cases = {
  async answer(client) {
    const found = await complete(client, request(20));
    same(found.finish_reason, "FINISH_REASON_LENGTH", "finish reason");
    same(found.usage.generated_tokens, 20, "tokens");
    check(found.initial.get("x-request-id").length === 1, "an id that the router assigned comes first");
  },
  async stream(client) {
    const whole = await complete(client, request(40));
    const found = await stream(client, request(40, 10));
    same(found.text, whole.text, "text");
    same(found.end.usage.generated_tokens, 40, "tokens");
    check(found.chunks > 10, `${found.chunks} chunks for 40 tokens at a pace of 10 ms`);
  },
  async many_streams_on_one_connection(client) {
    const whole = await complete(client, request(200));
    const found = await Promise.all(Array.from({ length: 100 }, () => stream(client, request(200))));
    for (const each of found) same(each.text, whole.text, "text");
  },
  async many_answers_one_by_one(client) {
    for (let i = 0; i < 300; ++i) same((await complete(client, request(1))).usage.generated_tokens, 1, "tokens");
  },
  async long_request(client) {
    const ids = Array.from({ length: 300_000 }, () => 20);
    same((await complete(client, { token_ids: { ids }, sampling: { max_tokens: 1 } })).usage.prompt_tokens, 300_000, "prompt");
  },
  async slow_reader(client) {
    const whole = await complete(client, request(20_000));
    const found = await stream(client, request(20_000), {
      each: (call, { chunks }) => {
        if (chunks === 5) {
          call.pause();
          setTimeout(() => call.resume(), 1500);
        }
      },
    });
    same(found.text, whole.text, "text");
  },
  async compressed() {
    const client = connect({ "grpc.default_compression_algorithm": 2, "grpc.default_compression_level": 2 });
    same((await complete(client, request(3, 0, { text: "0 0" + " ".repeat(5000) }))).usage.generated_tokens, 3, "tokens");
    client.close();
  },
  async unknown_model(client) {
    await refused(complete(client, request(1, 0, { model: "nobody" })), grpc.status.NOT_FOUND);
  },
  async invalid(client) {
    await refused(complete(client, { text: "0 0", sampling: { max_tokens: 1, top_p: 7 } }), grpc.status.INVALID_ARGUMENT);
    await refused(stream(client, { sampling: { max_tokens: 1 } }), grpc.status.INVALID_ARGUMENT);
  },
  async unknown_method() {
    const missing = grpc.makeGenericClientConstructor({
      Nothing: { ...Inference.service.Complete, path: "/cluster.v1.Inference/Nothing" },
    });
    const client = new missing(address, grpc.credentials.createInsecure());
    const call = new Promise((resolve, reject) =>
      client.Nothing(request(1), (error, answer) => (error ? reject(error) : resolve(answer))),
    );
    await refused(call, grpc.status.UNIMPLEMENTED);
    client.close();
  },
  async deadline(client) {
    const error = await refused(stream(client, request(1000, 30), { options: deadline(500) }), grpc.status.DEADLINE_EXCEEDED);
    check(error.found.chunks > 3, `${error.found.chunks} chunks came before it`);
  },
  async cancel(client) {
    const given_up = Array.from({ length: 20 }, () =>
      refused(stream(client, request(10_000, 10), { each: (call) => call.cancel() }), grpc.status.CANCELLED),
    );
    await Promise.all(given_up);
    same((await complete(client, request(5))).usage.generated_tokens, 5, "tokens");
  },
  async keepalive() {
    const client = connect({ "grpc.keepalive_time_ms": 300, "grpc.keepalive_timeout_ms": 1000, "grpc.keepalive_permit_without_calls": 1 });
    const found = await stream(client, request(4, 1000));
    same(found.end.usage.generated_tokens, 4, "tokens");
    await pause(1000);
    same((await complete(client, request(1))).usage.generated_tokens, 1, "tokens");
    client.close();
  },
  async metadata(client) {
    const metadata = new grpc.Metadata();
    metadata.set("x-tenant", "blue");
    metadata.set("trace-bin", Buffer.from([0, 255, 1]));
    metadata.set("long", "x".repeat(4000));
    same((await complete(client, request(1), deadline(5000), metadata)).usage.generated_tokens, 1, "tokens");
  },
};

let failed = 0;
const due = wanted.length ? wanted : Object.keys(cases);
console.log(JSON.stringify({ due }));
for (const name of due) {
  const client = connect();
  const began = performance.now();
  let error = null;
  try {
    await Promise.race([cases[name](client), pause(60_000).then(() => Promise.reject(new Error("no end within 60 s")))]);
  } catch (found) {
    error = String(found.message ?? found);
    failed = 1;
  }
  client.close();
  console.log(JSON.stringify({ case: name, error, seconds: Math.round(performance.now() - began) / 1e3 }));
}
process.exit(failed);

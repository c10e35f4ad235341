// @azure-rest/ai-inference on Node, over TLS: with a key, or with DefaultAzureCredential.
import assert from "node:assert/strict";
import ModelClient, { isUnexpected } from "@azure-rest/ai-inference";
import { AzureKeyCredential } from "@azure/core-auth";
import { createSseStream } from "@azure/core-sse";
import { DefaultAzureCredential } from "@azure/identity";

const endpoint = process.env.AZURE_INFERENCE_ENDPOINT;
const key = process.env.AZURE_INFERENCE_CREDENTIAL;
const client = ModelClient(endpoint, key ? new AzureKeyCredential(key) : new DefaultAzureCredential());
const messages = [
  { role: "system", content: "You are brief." },
  { role: "user", content: "What is the capital of France?" },
  { role: "assistant", content: "Paris." },
  { role: "user", content: "And of Italy?" },
];

const info = await client.path("/info").get();
assert.equal(info.status, "200");
assert.equal(info.body.model_type, "chat-completions");

const body = { messages, max_tokens: 8, temperature: 0 };
const answer = await client.path("/chat/completions").post({ body });
assert.ok(!isUnexpected(answer), JSON.stringify(answer.body));
assert.equal(answer.body.choices[0].message.role, "assistant");

const stream = await client
  .path("/chat/completions")
  .post({ body: { ...body, stream: true } })
  .asNodeStream();
assert.equal(stream.status, "200");
let text = "";
let usage;
for await (const event of createSseStream(stream.body)) {
  if (event.data === "[DONE]") break;
  const chunk = JSON.parse(event.data);
  for (const choice of chunk.choices) text += choice.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, answer.body.choices[0].message.content);
assert.deepEqual(usage, answer.body.usage);

const extras = { ...body, logprobs: true, top_logprobs: 2, n: 2 };
const refused = await client.path("/chat/completions").post({ body: extras });
assert.equal(refused.status, "400");
assert.match(refused.body.error.message, /Extra parameters \['logprobs', 'top_logprobs', 'n'\]/);
for (const header of ["extra-parameters", "extra-params"]) {
  const passed = await client
    .path("/chat/completions")
    .post({ body: extras, headers: { [header]: "pass-through" } });
  assert.equal(passed.status, "200", JSON.stringify(passed.body));
  assert.equal(passed.body.choices.length, 2);
}

const bad = await client.path("/chat/completions").post({ body: { messages, top_p: 7 } });
assert.ok(isUnexpected(bad) && bad.status === "422");
assert.equal(bad.body.error.status, 422);

if (key) {
  const wrong = await ModelClient(endpoint, new AzureKeyCredential("wrong")).path("/info").get();
  assert.equal(wrong.status, "401");
  assert.match(wrong.body.error.message, /auth token validation failed/);
}

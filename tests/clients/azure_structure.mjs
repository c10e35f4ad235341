// @azure-rest/ai-inference on Node: JSON, schemas and a loop of calls, whole and streamed.
import assert from "node:assert/strict";
import ModelClient, { isUnexpected } from "@azure-rest/ai-inference";
import { AzureKeyCredential } from "@azure/core-auth";
import { createSseStream } from "@azure/core-sse";
import { z } from "zod";
import {
  Person, checkCall, checkPerson, key, maxTokens, named, question, result, step, tools, url,
  weatherQuestion,
} from "./task.mjs";

const options = { allowInsecureConnection: true };
const client = ModelClient(url, new AzureKeyCredential(key), options);

async function ask(body) {
  const answer = await client.path("/chat/completions").post({ body });
  assert.ok(!isUnexpected(answer), JSON.stringify(answer.body));
  return answer.body.choices[0];
}

async function stream(body) {
  const answer = await client
    .path("/chat/completions")
    .post({ body: { ...body, stream: true } })
    .asNodeStream();
  assert.equal(answer.status, "200");
  const whole = { content: "", calls: [], finish_reason: null };
  for await (const event of createSseStream(answer.body)) {
    if (event.data === "[DONE]") return whole;
    for (const { delta, finish_reason } of JSON.parse(event.data).choices) {
      whole.content += delta?.content ?? "";
      whole.calls.push(...(delta?.tool_calls ?? []));
      whole.finish_reason = finish_reason ?? whole.finish_reason;
    }
  }
  throw new Error("the stream ended without [DONE]");
}

const own = { max_tokens: maxTokens, temperature: 0 };
const messages = [{ role: "user", content: question }];
const response_format = {
  type: "json_schema",
  json_schema: { name: "person", strict: true, schema: z.toJSONSchema(Person) },
};
step("json_schema");
const person = checkPerson((await ask({ ...own, messages, response_format })).message.content);
step("json_schema, streamed");
const streamed = await stream({ ...own, messages, response_format });
assert.deepEqual(checkPerson(streamed.content), person);
step("json_object");
const open = { type: "json_object" };
const object = await ask({ ...own, max_tokens: 40, messages, response_format: open });
assert.equal(object.message.content.trimStart()[0], "{");

const asked = [{ role: "user", content: weatherQuestion }];
for (const tool_choice of [named, "required"]) {
  const kind = typeof tool_choice === "string" ? tool_choice : "named";
  step(`${kind} call`);
  const { message, finish_reason } = await ask({ ...own, messages: asked, tools, tool_choice });
  assert.equal(finish_reason, "tool_calls");
  for (const call of message.tool_calls) checkCall(call.function.name, call.function.arguments);
  const results = message.tool_calls.map(({ id }) => ({
    role: "tool", tool_call_id: id, content: result,
  }));
  const talk = [...asked, message, ...results];
  const silent = { ...own, max_tokens: 16, messages: talk, tools, tool_choice: "none" };
  step(`answer to the result of a ${kind} call`);
  const end = await ask(silent);
  assert.ok(end.message.content && !end.message.tool_calls);
  step(`${kind} call, streamed`);
  const whole = await stream({ ...own, messages: asked, tools, tool_choice });
  assert.equal(whole.finish_reason, "tool_calls");
  assert.ok(whole.calls.length > 0);
  for (const call of whole.calls) checkCall(call.function.name, call.function.arguments);
  step(`answer to the result of a ${kind} call, streamed`);
  const ending = await stream(silent);
  assert.ok(ending.content && ending.calls.length === 0);
}

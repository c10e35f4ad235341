// openai on Node: zodResponseFormat, zodFunction, and the same by responses.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import {
  Person, checkCall, functions, key, maxTokens, model, named, question, result, step, tools, url,
  weatherQuestion,
} from "./task.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const options = { model, max_tokens: maxTokens, temperature: 0 };
const asked = [{ role: "user", content: question }];
const askedWeather = [{ role: "user", content: weatherQuestion }];

step("chat parse");
const response_format = zodResponseFormat(Person, "person");
const answer = await client.chat.completions.parse({ ...options, messages: asked, response_format });
Person.parse(answer.choices[0].message.parsed);
assert.equal(answer.choices[0].finish_reason, "stop");
step("chat parse, streamed");
const runner = client.chat.completions.stream({ ...options, messages: asked, response_format });
const last = await runner.finalChatCompletion();
assert.deepEqual(last.choices[0].message.parsed, answer.choices[0].message.parsed);

const zodTools = Object.entries(functions).map(([name, { description, parameters }]) =>
  zodFunction({ name, description, parameters }),
);
for (const [kind, offered, tool_choice] of [
  ["named", tools, named],
  ["required, zodFunction,", zodTools, "required"],
]) {
  step(`chat ${kind} call`);
  const whole = await client.chat.completions.create({
    ...options, messages: askedWeather, tools: offered, tool_choice, parallel_tool_calls: false,
  });
  const { message, finish_reason } = whole.choices[0];
  assert.equal(finish_reason, "tool_calls");
  assert.equal(message.tool_calls.length, 1);
  const call = message.tool_calls[0];
  checkCall(call.function.name, call.function.arguments);
  const talk = [
    ...askedWeather,
    message,
    { role: "tool", tool_call_id: call.id, content: result },
  ];
  step(`chat answer to the result of a ${kind} call`);
  const end = await client.chat.completions.create({
    ...options, max_tokens: 16, messages: talk, tools: offered, tool_choice: "none",
  });
  assert.ok(end.choices[0].message.content && !end.choices[0].message.tool_calls);
  step(`chat ${kind} call, streamed`);
  const streamed = await client.chat.completions
    .stream({
      ...options, messages: askedWeather, tools: offered, tool_choice, parallel_tool_calls: false,
    })
    .finalChatCompletion();
  const again = streamed.choices[0].message.tool_calls[0];
  checkCall(again.function.name, again.function.arguments);
  assert.equal(streamed.choices[0].finish_reason, "tool_calls");
  step(`chat answer to the result of a ${kind} call, streamed`);
  let text = "";
  for await (const chunk of await client.chat.completions.create({
    ...options, max_tokens: 16, messages: talk, tools: offered, tool_choice: "none", stream: true,
  })) text += chunk.choices[0]?.delta.content ?? "";
  assert.ok(text);
}

const own = { model, max_output_tokens: maxTokens, temperature: 0, store: false };
const text = { format: zodTextFormat(Person, "person") };
step("responses parse");
const parsed = await client.responses.parse({ ...own, input: question, text });
Person.parse(parsed.output_parsed);
step("responses parse, streamed");
const events = client.responses.stream({ ...own, input: question, text });
assert.deepEqual((await events.finalResponse()).output_parsed, parsed.output_parsed);
const flat = Object.entries(functions).map(([name, { description, parameters }]) =>
  zodResponsesFunction({ name, description, parameters }),
);
const tool_choice = { type: "function", name: "get_weather" };
const input = [{ role: "user", content: weatherQuestion }];
step("responses named call");
const first = await client.responses.parse({ ...own, input, tools: flat, tool_choice });
const [call] = first.output.filter((item) => item.type === "function_call");
checkCall(call.name, call.arguments);
const talk = [...input, call, { type: "function_call_output", call_id: call.call_id, output: result }];
step("responses answer to a result");
const end = await client.responses.create({
  ...own, max_output_tokens: 16, input: talk, tools: flat, tool_choice: "none",
});
assert.ok(end.output_text);
step("responses required call, streamed");
const stream = client.responses.stream({ ...own, input, tools: flat, tool_choice: "required" });
const [again] = (await stream.finalResponse()).output.filter((i) => i.type === "function_call");
checkCall(again.name, again.arguments);
step("responses answer to a result, streamed");
const ending = client.responses.stream({
  ...own, max_output_tokens: 16, input: talk, tools: flat, tool_choice: "none",
});
assert.ok((await ending.finalResponse()).output_text);

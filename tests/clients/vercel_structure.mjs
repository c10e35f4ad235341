// The Vercel AI SDK: objects and calls by its providers for compatible servers and for OpenAI.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import {
  Person, checkCall, functions, key, maxTokens, model, question, result, step, url,
  weatherQuestion,
} from "./task.mjs";

const baseURL = `${url}/v1`;
const compatible = createOpenAICompatible({
  name: "ours", baseURL, apiKey: key, supportsStructuredOutputs: true, includeUsage: true,
});
const openai = createOpenAI({ baseURL, apiKey: key });
const offered = Object.fromEntries(
  Object.entries(functions).map(([name, { description, parameters }]) => [
    name, tool({ description, inputSchema: parameters, execute: async () => result }),
  ]),
);
const own = { maxOutputTokens: maxTokens, temperature: 0, maxRetries: 0 };

for (const [name, languageModel, store] of [
  ["compatible", compatible(model), {}],
  ["openai chat", openai.chat(model), {}],
  ["openai responses", openai.responses(model), { providerOptions: { openai: { store: false } } }],
]) {
  const options = { ...own, ...store, model: languageModel };
  const output = Output.object({ schema: Person, name: "person" });
  step(`${name} object`);
  const whole = await generateText({ ...options, prompt: question, output });
  Person.parse(whole.output);
  step(`${name} object, streamed`);
  const streamed = streamText({ ...options, prompt: question, output });
  let partial;
  for await (const part of streamed.partialOutputStream) partial = part;
  assert.deepEqual(partial, whole.output);
  for (const toolChoice of [{ type: "tool", toolName: "get_weather" }, "required"]) {
    const kind = typeof toolChoice === "string" ? toolChoice : "named";
    const ask = {
      ...options, prompt: weatherQuestion, tools: offered, toolChoice, stopWhen: stepCountIs(2),
      // The second step answers to what the call gave.
      prepareStep: ({ stepNumber }) => (stepNumber === 0 ? {} : { toolChoice: "none" }),
    };
    step(`${name} loop from a ${kind} call`);
    const loop = await generateText(ask);
    assert.equal(loop.steps.length, 2);
    assert.equal(loop.steps[0].finishReason, "tool-calls");
    for (const call of loop.steps[0].toolCalls) checkCall(call.toolName, call.input);
    assert.ok(loop.text);
    step(`${name} loop from a ${kind} call, streamed`);
    const stream = streamText({ ...ask, onError: ({ error }) => { throw error; } });
    await stream.consumeStream();
    const steps = await stream.steps;
    assert.equal(steps.length, 2);
    for (const call of steps[0].toolCalls) checkCall(call.toolName, call.input);
    assert.ok(await stream.text);
  }
}

// The Vercel AI SDK by each of its providers that speaks to us: texts, streams, objects, calls.
import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createAzure } from "@ai-sdk/azure";
import { createMistral } from "@ai-sdk/mistral";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, streamText, tool } from "ai";
import {
  Person, checkCall, functions, key, maxTokens, model, question, result, step, url,
  weatherQuestion,
} from "./task.mjs";

const own = { baseURL: `${url}/v1`, apiKey: key };
const openai = createOpenAI(own);
const compatible = createOpenAICompatible({
  ...own, name: "ours", supportsStructuredOutputs: true, includeUsage: true,
});
const azure = { baseURL: `${url}/openai`, apiKey: key };
const providers = [
  ["openai responses", openai(model)],
  ["openai chat", openai.chat(model)],
  ["openai text", openai.completion(model), "texts"],
  ["compatible", compatible(model)],
  ["compatible text", compatible.completionModel(model), "texts"],
  ["mistral", createMistral(own)(model)],
  ["anthropic", createAnthropic(own)(model)],
  ["azure deployment", createAzure({ ...azure, useDeploymentBasedUrls: true }).chat(model)],
  ["azure responses", createAzure(azure)(model)],
];
const [[name, { description, parameters }]] = Object.entries(functions);
const offered = { [name]: tool({ description, inputSchema: parameters, execute: () => result }) };

for (const [provider, languageModel, kind] of providers) {
  const options = { model: languageModel, maxRetries: 0, temperature: 0, maxOutputTokens: 8 };
  step(`${provider} text`);
  const whole = await generateText({ ...options, prompt: "Say hello." });
  assert.ok(whole.text && whole.usage.totalTokens, JSON.stringify(whole.usage));
  step(`${provider} stream`);
  const stream = streamText({ ...options, prompt: "Say hello." });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text);
  assert.equal((await stream.usage).totalTokens, whole.usage.totalTokens);
  if (kind === "texts") continue;
  const long = { ...options, maxOutputTokens: maxTokens };
  step(`${provider} object`);
  const output = Output.object({ schema: Person, name: "person" });
  Person.parse((await generateText({ ...long, prompt: question, output })).output);
  step(`${provider} call`);
  const called = await generateText({
    ...long, prompt: weatherQuestion, tools: offered, toolChoice: { type: "tool", toolName: name },
  });
  checkCall(called.toolCalls[0].toolName, called.toolCalls[0].input);
}

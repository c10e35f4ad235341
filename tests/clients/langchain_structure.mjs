// LangChain on Node, by @langchain/openai and @langchain/mistralai: three methods, loops of calls.
import assert from "node:assert/strict";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { ChatMistralAI } from "@langchain/mistralai";
import { ChatOpenAI } from "@langchain/openai";
import {
  Person, checkCall, key, maxTokens, model, named, question, result, step, tools, url, weatherQuestion,
} from "./task.mjs";

const own = { model, maxTokens, temperature: 0, maxRetries: 0 };
const models = {
  openai: new ChatOpenAI({ ...own, apiKey: key, configuration: { baseURL: `${url}/v1` } }),
  mistral: new ChatMistralAI({ ...own, apiKey: key, serverURL: url }),
};

for (const [name, chat] of Object.entries(models)) {
  for (const method of ["jsonSchema", "functionCalling", "jsonMode"]) {
    step(`${name} ${method}`);
    const structured = chat.withStructuredOutput(Person, {
      name: "person", method, includeRaw: method === "jsonMode",
    });
    const answer = await structured.invoke(question);
    // jsonMode sends no schema: that it is an object is all that the wire promises.
    if (method === "jsonMode") assert.equal(answer.raw.content.trimStart()[0], "{");
    else Person.parse(answer);
  }
  // Mistral's package takes a name only as an object; OpenAI's takes both.
  for (const tool_choice of [name === "openai" ? "get_weather" : named, "any"]) {
    const kind = typeof tool_choice === "string" ? tool_choice : "named";
    const asked = [new HumanMessage(weatherQuestion)];
    const bound = chat.bindTools(tools, { tool_choice });
    step(`${name} ${kind} call`);
    const answer = await bound.invoke(asked);
    assert.ok(answer.tool_calls.length > 0);
    for (const call of answer.tool_calls) checkCall(call.name, call.args);
    const results = answer.tool_calls.map(
      ({ id, name }) => new ToolMessage({ content: result, tool_call_id: id, name }),
    );
    const silent = chat.bindTools(tools, { tool_choice: "none" });
    step(`${name} answer to the result of a ${kind} call`);
    assert.ok((await silent.invoke([...asked, answer, ...results])).content);
    step(`${name} ${kind} call, streamed`);
    let whole;
    for await (const chunk of await bound.stream(asked)) whole = whole?.concat(chunk) ?? chunk;
    assert.ok(whole.tool_calls.length > 0);
    for (const call of whole.tool_calls) checkCall(call.name, call.args);
  }
}

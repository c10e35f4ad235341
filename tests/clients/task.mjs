// What every client asks: a record of six fields and a set of two functions; task.py says more.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { z } from "zod";

export const url = process.env.ENDPOINT;
export const key = process.env.KEY;
export const model = process.env.MODEL ?? "SmolLM2-135M-Instruct";
export const maxTokens = 160;
export const question =
  "Ada is 36, lives in Paris, likes chess and tea, and is a member. Describe her.";
export const weatherQuestion = "What is the weather in Paris?";
export const result = "12 degrees, rain";

export const Person = z.object({
  name: z.string().max(12),
  town: z.enum(["Paris", "Rome", "Oslo"]),
  age: z.number().int().min(0).max(120),
  likes: z.array(z.string().max(8)).max(2),
  is_member: z.boolean(),
  note: z.string().max(12).nullable(),
});
export const functions = {
  get_weather: {
    description: "The weather in a town.",
    parameters: z.object({ town: z.string().max(12), unit: z.enum(["c", "f"]) }),
  },
  add: {
    description: "Adds two numbers.",
    parameters: z.object({
      a: z.number().int().min(0).max(99),
      b: z.number().int().min(0).max(99),
    }),
  },
};
export const tools = Object.entries(functions).map(([name, { description, parameters }]) => ({
  type: "function",
  function: { name, description, parameters: z.toJSONSchema(parameters) },
}));
export const named = { type: "function", function: { name: "get_weather" } };

// Names the call that follows for whoever records the requests.
export function step(label) {
  console.log(label);
  if (process.env.STEP_FILE) writeFileSync(process.env.STEP_FILE, label);
}

export function checkPerson(text) {
  return Person.parse(JSON.parse(text));
}

export function checkCall(name, args) {
  assert.ok(name in functions, name);
  return functions[name].parameters.parse(typeof args === "string" ? JSON.parse(args) : args);
}

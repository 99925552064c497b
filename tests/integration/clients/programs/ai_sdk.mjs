// Vercel AI SDK: a tool that is carried out and answered, a stream, and a structured object, by
// `@ai-sdk/openai-compatible` (chat completions) or `@ai-sdk/openai` (its default, responses).
//
// Usage: node ai_sdk.mjs compatible|openai. Its packages are found in CLIENTS_FOLDER.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.env.CLIENTS_FOLDER}/package.json`);
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { generateText, streamText, jsonSchema, tool, stepCountIs, Output } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createOpenAI } = await load("@ai-sdk/openai");

const settings = {
  baseURL: `${process.env.SERVICE_URL}/v1`,
  apiKey: "none",
  name: "served",
  supportsStructuredOutputs: true,
};
const isOpenAI = process.argv[2] === "openai";
const provider = isOpenAI ? createOpenAI(settings) : createOpenAICompatible(settings);
const model = provider(process.env.SERVICE_MODEL);
const providerOptions = isOpenAI ? { openai: { parallelToolCalls: false } } : {};
const schema = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
const cities = [];
const get_weather = tool({
  description: "The weather in a city.",
  inputSchema: jsonSchema(schema),
  execute: async ({ city }) => {
    cities.push(city);
    return "18 degrees and sunny";
  },
});
const call = {
  model,
  providerOptions,
  prompt: "What is the weather in Paris?",
  tools: { get_weather },
  stopWhen: stepCountIs(2),
  // The bundled model does not decide by itself: it must call first, and then must not.
  prepareStep: ({ stepNumber }) => ({
    toolChoice: stepNumber === 0 ? { type: "tool", toolName: "get_weather" } : "none",
  }),
  maxOutputTokens: 32,
  temperature: 0,
  maxRetries: 0,
};
const called = await generateText(call);
const streamed = streamText(call);
let deltas = "";
for await (const delta of streamed.textStream) deltas += delta;
const object = await generateText({
  model,
  prompt: "What is the capital of France?",
  output: Output.object({ schema: jsonSchema(schema) }),
  maxOutputTokens: 48,
  temperature: 0,
  maxRetries: 0,
});
console.log(
  JSON.stringify({
    cities,
    answer: called.text,
    steps: called.steps.length,
    streamed: deltas,
    parsed: object.output.city,
  }),
);

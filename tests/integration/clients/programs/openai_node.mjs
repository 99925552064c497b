// openai for Node: a tool that is carried out and answered over chat, and a streamed response.
//
// Its package is found in CLIENTS_FOLDER.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.env.CLIENTS_FOLDER}/package.json`);
const { default: OpenAI } = await import(pathToFileURL(require.resolve("openai")));

const client = new OpenAI({ baseURL: `${process.env.SERVICE_URL}/v1`, apiKey: "none" });
const model = process.env.SERVICE_MODEL;
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
const cities = [];
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const ask = (fields) =>
  client.chat.completions.create({ model, messages, max_tokens: 32, temperature: 0, ...fields });

const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
const asked = await ask({ tools, tool_choice: "required", parallel_tool_calls: false });
const [call] = asked.choices[0].message.tool_calls;
cities.push(JSON.parse(call.function.arguments).city);
messages.push(asked.choices[0].message);
messages.push({ role: "tool", tool_call_id: call.id, content: "18 degrees and sunny" });
const answer = await ask({});

const stream = client.responses.stream({ model, input: "Name a colour.", max_output_tokens: 16 });
let deltas = "";
for await (const event of stream) {
  if (event.type === "response.output_text.delta") deltas += event.delta;
}
console.log(
  JSON.stringify({ cities, answer: answer.choices[0].message.content, responses: deltas }),
);

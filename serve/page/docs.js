// The description of the API, for people: what openapi.json says, path by path, with a call to copy.

const main = document.getElementById("paths");
const make = (name, text, ...children) => {
  const element = document.createElement(name);
  if (text !== undefined && text !== null) element.textContent = text;
  element.append(...children);
  return element;
};

const described = await (await fetch("openapi.json")).json();
const groups = {};
for (const [path, methods] of Object.entries(described.paths))
  for (const [method, operation] of Object.entries(methods)) (groups[operation.tags?.[0] ?? "other"] ??= []).push({ path, method, operation });

main.replaceChildren();
for (const [name, list] of Object.entries(groups).sort()) {
  main.append(make("h2", name), ...list.map(section));
}

function section({ path, method, operation }) {
  const summary = make("summary", null, make("b", method.toUpperCase()), make("code", path), make("span", operation.summary ?? ""));
  const body = make("div");
  body.className = "body";
  if (operation.description) body.append(make("p", operation.description));
  const content = operation.requestBody?.content["application/json"];
  if (content) body.append(parameters(content.schema), make("pre", curl(path, content.example)));
  const table = make("table", null, ...Object.entries(operation.responses).map(([code, answer]) => make("tr", null, make("th", code), make("td", answer.description ?? ""))));
  body.append(table);
  const example = operation.responses["200"]?.content?.["application/json"]?.example;
  if (example) body.append(make("pre", JSON.stringify(example, null, 2)));
  return make("details", null, summary, body);
}

function parameters(schema) {
  const head = make("tr", null, ...["parameter", "type", "default", "allowed"].map((text) => make("th", text)));
  const rows = Object.entries(schema.properties).map(([name, p]) => {
    const range = p.enum ? p.enum.join(", ") : p.minimum !== undefined ? `${p.minimum} to ${p.maximum ?? "…"}` : "";
    return make("tr", null, make("td", name), make("td", p.type), make("td", schema.required?.includes(name) ? "required" : JSON.stringify(p.default) ?? ""), make("td", range));
  });
  return make("table", null, head, ...rows);
}

function curl(path, example) {
  const key = described.security ? ` -H 'x-api-key: YOUR_API_KEY'` : "";
  return `curl ${location.origin}${path}${key} -H 'content-type: application/json' \\\n  -d '${JSON.stringify(example).replaceAll("'", "'\\''")}'${path.startsWith("/v1") ? " -o picture.jpg" : ""}`;
}

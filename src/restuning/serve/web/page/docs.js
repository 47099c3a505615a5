"use strict";
// Draws the OpenAPI file as a page; no library, for none may come from elsewhere.

function make(kind, inside = [], more = {}) {
  const made = document.createElement(kind);
  Object.assign(made, more);
  for (const each of [].concat(inside)) made.append(each);
  return made;
}

function nameOf(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(nameOf).join(" or ");
  if (schema.type === "array") return `list of ${nameOf(schema.items) || "anything"}`;
  return schema.type || "anything";
}

function fields(schema, all) {
  const found = schema?.$ref ? all[schema.$ref.split("/").pop()] : schema;
  if (!found?.properties) return [];
  const required = new Set(found.required || []);
  return [make("ul", Object.entries(found.properties).map(([name, field]) =>
    make("li", [make("code", name), ` ${nameOf(field)}${required.has(name) ? ", required" : ""}. ${field.description || ""}`])))];
}

function bodies(content, all) {
  return Object.entries(content || {}).flatMap(([kind, { schema }]) =>
    [make("p", [make("code", kind), ` ${nameOf(schema)}`]), ...fields(schema, all)]);
}

async function draw() {
  const told = await (await fetch("openapi.json")).json();
  const all = told.components.schemas;
  for (const [path, methods] of Object.entries(told.paths)) {
    for (const [method, of] of Object.entries(methods)) {
      const answer = of.responses["200"]?.content;
      document.getElementById("paths").append(make("section", [
        make("h2", make("code", `${method.toUpperCase()} ${path}`)),
        make("p", of.description || ""),
        ...(of.requestBody ? [make("h3", "Takes"), ...bodies(of.requestBody.content, all)] : []),
        ...(answer ? [make("h3", "Gives"), ...bodies(answer, all)] : []),
      ]));
    }
  }
}

draw();

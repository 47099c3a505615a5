"use strict";
// Asks the server that it came from and nobody else. What is shown of names and labels is text, never markup.

const at = (id) => document.getElementById(id);
const MOST_HISTORY = 50;
let tasks = [];
let files = [];

function make(kind, inside = [], more = {}) {
  const made = document.createElement(kind);
  Object.assign(made, more);
  for (const each of [].concat(inside)) made.append(each);
  return made;
}

const ms = (seconds) => `${(1000 * seconds).toFixed(seconds < 0.01 ? 2 : 1)} ms`;
const percent = (share) => `${(100 * share).toFixed(1)} %`;

function say(error) {
  at("error").hidden = !error;
  at("error").textContent = error || "";
}

async function fetchJson(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch {
    throw new Error("The server does not answer.");
  }
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const wait = answer.headers.get("retry-after");
    const told = body.error?.message || `The server answered ${answer.status}.`;
    throw new Error(wait ? `${told}\nAsk again in ${wait} s.` : told);
  }
  return body;
}

async function listTasks() {
  const chosen = new Set(tasks.filter((t) => !t.box.checked).map((t) => t.name));
  const said = await fetchJson("v1/tasks");
  tasks = said.tasks.map((task) => {
    const box = make("input", [], { type: "checkbox", checked: !chosen.has(task.name), id: `task-${task.name}` });
    const own = task.forward === "own" ? ", a forward of its own" : "";
    const told = `${task.name} (${task.kind}, ${task.answers}${own})`;
    const row = make("li", make("label", [box, make("span", told)]));
    return { ...task, box, row };
  });
  at("task-list").replaceChildren(...tasks.map((t) => t.row));
  const kinds = new Set(tasks.map((t) => t.kind));
  at("drop").hidden = !kinds.has("image") && !kinds.has("audio");
  const what = [kinds.has("image") ? "images" : "", kinds.has("audio") ? "sounds" : ""].filter(Boolean).join(" or ") || "files";
  at("files-label").textContent = `${what[0].toUpperCase()}${what.slice(1)}: choose files, drop them here, or paste one`;
  at("files").accept = [kinds.has("image") ? "image/*" : "", kinds.has("audio") ? "audio/*" : ""].filter(Boolean).join(",");
  at("write").hidden = !kinds.has("text") && !kinds.has("words");
  const refused = Object.keys(said.refused).length + tasks.filter((t) => t.refused).length;
  const backbones = new Set(tasks.map((t) => t.backbone)).size;
  at("summary").textContent = `${tasks.length} ${tasks.length === 1 ? "task" : "tasks"} on ${backbones} ${backbones === 1 ? "backbone" : "backbones"}` +
    (refused ? `; ${refused} folders were refused` : "");
  filter();
}

function filter() {
  const wanted = at("filter").value.trim().toLowerCase();
  for (const task of tasks) task.row.hidden = !task.name.toLowerCase().includes(wanted);
}

function choose(checked) {
  for (const task of tasks) if (!task.row.hidden) task.box.checked = checked;
}

const isSound = (file) =>
  file.type.startsWith("audio/") || (!file.type && /\.(wave?|flac|og[ga]|opus|mp3|aif[fc]?|au|caf|w64)$/i.test(file.name));

function take(list) {
  const taken = [...list].filter((file) => file.type.startsWith("image/") || isSound(file) || !file.type);
  // In the order of the answers: images first.
  files = [...taken.filter((file) => !isSound(file)), ...taken.filter(isSound)];
  at("progress").textContent = files.length ? files.map((file) => file.name || "pasted image").join(", ") : "";
}

function numbers(said) {
  return said.numbers.map((number) => make("div", [
    make("span", number.label, { className: "name" }),
    make("span", number.value.toPrecision(4) + (number.error === null ? "" : ` ± ${number.error.toPrecision(2)}`),
      { className: "share" }),
  ], { className: "choice" }));
}

// A mask is a picture with a palette; it comes from our own server, and lies on the image that was asked about.
function mask(said, name, picture) {
  const laid = make("div", [picture(), make("img", [], { alt: said.label, className: "mask", src: `data:image/png;base64,${said.mask}` })],
    { className: "laid" });
  const strength = make("input", [], { type: "range", min: 0, max: 100, value: 50, ariaLabel: `Strength of the mask of ${name}` });
  const draw = () => laid.style.setProperty("--strength", strength.value / 100);
  strength.addEventListener("input", draw);
  draw();
  const shares = said.shares.map((each, number) => make("div", [
    make("span", [swatch(said.colours?.[number]), each.label], { className: "name" }),
    make("span", percent(each.share), { className: "share" }),
    make("meter", [], { value: each.share, min: 0, max: 1, ariaLabel: `${each.label}: ${percent(each.share)}` }),
  ], { className: "choice" }));
  return [laid, make("label", ["Strength of the mask", strength], { className: "strength" }), ...shares];
}

function swatch(colour) {
  const made = make("i", [], { className: "swatch" });
  if (colour) made.style.background = colour;
  return made;
}

// Dark is near and bright far, as its words say.
function depth(said) {
  const { least, most, picture } = said.depth;
  const scale = least === null ? "" : `dark ${least.toPrecision(4)}, bright ${most.toPrecision(4)}`;
  return [make("img", [], { alt: said.label, className: "mask", src: `data:image/png;base64,${picture}` }),
    make("div", [make("span", said.label, { className: "name" }), make("span", scale, { className: "share" })], { className: "choice" })];
}

function bars(said, name, picture) {
  if (said.numbers) return numbers(said);
  if (said.depth) return depth(said);
  if (said.mask) return mask(said, name, picture);
  if (!said.top) return [make("div", make("span", said.label, { className: "name" }), { className: "choice" })];
  const tags = new Set((said.tags || []).map((tag) => tag.label));
  return said.top.map((choice) => make("div", [
    make("span", (tags.has(choice.label) ? "✓ " : "") + choice.label, { className: "name" }),
    make("span", percent(choice.probability), { className: "share" }),
    make("meter", [], { value: choice.probability, min: 0, max: 1, ariaLabel: `${choice.label}: ${percent(choice.probability)}` }),
  ], { className: "choice" }));
}

function words(said) {
  return make("p", said.map((word) =>
    make("span", [word.word, " ", make("small", word.top ? `${word.label} ${percent(word.probability)}` : word.label)])
  ), { className: "words" });
}

function show(answer, given, picture) {
  const named = make("div", [given, make("h2", answer.input)], { className: "given" });
  const each = Object.entries(answer.tasks).map(([name, said]) =>
    make("section", [make("h3", name), ...(Array.isArray(said) ? [words(said)] : bars(said, name, picture))], { ariaLabel: name }));
  const s = answer.seconds;
  const times = answer.cached
    ? `known from before: no forward; tasks ${ms(s.tasks)}`
    : `forward ${ms(s.forward)}, tasks ${ms(s.tasks)}, decoding ${ms(s.decode)}, waiting ${ms(s.wait)}`;
  return make("article", [named, make("div", each, { className: "task-answers" }), make("p", times, { className: "times" })]);
}

// Sounds of the answers that are shown: a player reads its file as long as it is there.
const playing = [];

function player(file) {
  const address = URL.createObjectURL(file);
  playing.push(address);
  return make("audio", [], { controls: true, preload: "metadata", src: address, ariaLabel: file.name });
}

function remember(answers) {
  for (const answer of answers) {
    const best = Object.entries(answer.tasks)
      .map(([name, said]) => `${name}: ${Array.isArray(said) ? said.map((w) => w.label).join(" ") : said.label}`);
    at("history").prepend(make("li", `${answer.input} — ${best.join(", ")}`));
  }
  while (at("history").children.length > MOST_HISTORY) at("history").lastChild.remove();
  at("history-section").hidden = !at("history").children.length;
}

let asked = 0;

async function ask() {
  const text = at("text").value;
  // Others may be chosen, or asked about, before the answer comes.
  const given = files;
  const kinds = new Set([...given.map((file) => (isSound(file) ? "audio" : "image")), ...(text.trim() ? ["text", "words"] : [])]);
  const wanted = tasks.filter((t) => t.box.checked && kinds.has(t.kind)).map((t) => t.name);
  if (!kinds.size) return say("Choose a file or write a text.");
  if (!wanted.length) return say("No task is chosen that answers this.");
  say("");
  const form = new FormData();
  for (const file of given) form.append(isSound(file) ? "sounds" : "images", file, file.name || "pasted image");
  if (text.trim()) form.append("texts", text);
  form.append("tasks", wanted.join(","));
  form.append("top", at("top").value || "3");
  const turn = ++asked;
  at("ask").disabled = true;
  at("progress").textContent = "Asking …";
  const began = performance.now();
  try {
    const said = await fetchJson("v1/predict", { method: "POST", body: form });
    remember(said.answers.map((answer, n) => (given[n] ? answer : { ...answer, input: text.slice(0, 80) })));
    if (turn !== asked) return;
    for (const address of playing.splice(0)) URL.revokeObjectURL(address);
    const shown = said.answers.map((answer, number) => {
      const file = given[number];
      if (!file) return show({ ...answer, input: text }, "");
      if (isSound(file)) return show(answer, player(file));
      const picture = () => {
        const image = make("img", [], { alt: "", src: URL.createObjectURL(file) });
        image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
        return image;
      };
      return show(answer, picture(), picture);
    });
    at("answers").replaceChildren(...shown);
    at("progress").textContent =
      `${shown.length} answered by ${wanted.length} ${wanted.length === 1 ? "task" : "tasks"} in ${ms((performance.now() - began) / 1000)}`;
    at("answers").focus({ preventScroll: true });
  } catch (error) {
    if (turn === asked) at("progress").textContent = "";
    say(error.message);
  } finally {
    if (turn === asked) at("ask").disabled = false;
  }
}

at("question").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
at("text").addEventListener("keydown", (event) => { if (event.key === "Enter" && event.ctrlKey) ask(); });
at("files").addEventListener("change", (event) => take(event.target.files));
at("filter").addEventListener("input", filter);
at("all").addEventListener("click", () => choose(true));
at("none").addEventListener("click", () => choose(false));
at("forget").addEventListener("click", () => { at("history").replaceChildren(); at("history-section").hidden = true; });
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) { take(event.dataTransfer.files); ask(); }
  });
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) { take(event.clipboardData.files); ask(); }
});
listTasks().catch((error) => say(error.message));
// Tasks come and go while the page is open.
setInterval(() => { if (!document.hidden) listTasks().catch(() => {}); }, 30000);

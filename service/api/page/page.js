// The page: sends images to /predict and /explain of the service that served it, and shows the answers.
// Addresses are relative, so that it works behind a proxy that adds a prefix.

const PARALLEL = 4; // requests at a time
const VIRIDIS = "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e 1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725"
  .split(" ").map((colour) => [0, 2, 4].map((at) => parseInt(colour.slice(at, at + 2), 16)));
const PARTS = [["decode", "decoding"], ["queue", "queue"], ["inference", "model"], ["rest", "other"]];

const element = (id) => document.getElementById(id);
const keyForm = element("key");
const keyInput = element("key-value");

let key = ""; // in memory alone: gone with the page
let explains = true; // until the service says that it does not
let refused = []; // what to send again, once there is a key
const waiting = [];
let running = 0;

// ---- Requests

/** Failure in words for people, with the service's code where it gave one. */
class Failure extends Error {
  constructor(status, message, code = "", mayPass = false) {
    super(message);
    Object.assign(this, { status, code, mayPass });
  }
}

async function post(path, file, signal) {
  const body = new FormData();
  body.append("file", file, file.name);
  let response, text;
  try {
    response = await fetch(path, { method: "POST", body, signal, headers: { Accept: "application/json", ...(key && { "X-API-Key": key }) } });
    text = await response.text();
  } catch {
    throw new Failure(0, "The service can't be reached, or the file can't be read any more.", "", true);
  }
  let answer;
  try {
    answer = JSON.parse(text);
  } catch {
    throw new Failure(response.status, `Something between here and the service answered with status ${response.status}.`, "", true);
  }
  if (response.ok) return [answer, response.headers];
  const { code = "", message = "", request_id: id } = answer.error ?? {};
  const after = response.headers.get("Retry-After");
  throw new Failure(
    response.status,
    message + (after ? ` Try again in ${after} s.` : ""),
    id ? `${code} · request ${id}` : code,
    response.status === 408 || response.status >= 500,
  );
}

/** Run a task when fewer than PARALLEL others run. */
function enqueue(task) {
  waiting.push(task);
  runNext();
}

function runNext() {
  while (running < PARALLEL && waiting.length) {
    running += 1;
    waiting.shift()().finally(() => {
      running -= 1;
      runNext();
    });
  }
}

// ---- Words

const say = (words) => { element("status").textContent = words; };
const shown = (label) => label.replaceAll("_", " ");
const percent = (share) => `${(share * 100).toFixed(1)} %`;
const milliseconds = (value) => `${value.toFixed(value < 10 ? 1 : 0)} ms`;

/** The command that sends the same file, for a POSIX shell. */
function curlCommand(name) {
  const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
  const path = /[;,"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name; // curl's own quotes
  const header = key ? '-H "X-API-Key: $KEY" ' : "";
  return `curl ${header}-F ${quoted(`file=@${path}`)} ${quoted(new URL("predict", document.baseURI).href)}`;
}

/** Milliseconds of each part, from the header Server-Timing; null where a proxy keeps it. */
function timing(header) {
  const times = Object.fromEntries(
    [...(header ?? "").matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, value]) => [name, Number(value)]),
  );
  if (!("total" in times)) return null;
  times.rest = Math.max(0, times.total - times.decode - times.queue - times.inference);
  return times;
}

/** Where a map is strongest, for those who don't see it. */
function strongest(map) {
  const size = [map.length, map[0].length];
  const top = map.flatMap((row, y) => row.map((value, x) => [value, y, x])).sort((a, b) => b[0] - a[0])[0];
  const third = (axis) => Math.min(2, Math.floor((top[axis + 1] + .5) / size[axis] * 3));
  const words = [["top", "", "bottom"][third(0)], ["left", "", "right"][third(1)]].filter(Boolean).join(" ");
  return words ? `at the ${words}` : "in the centre";
}

// ---- One result

class Result {
  constructor(file, explainAtOnce) {
    this.file = file;
    this.explainAtOnce = explainAtOnce;
    this.card = element("result").content.firstElementChild.cloneNode(true);
    this.find(".name").textContent = file.name;
    this.find("h2").textContent = "…";
    this.showImage();
    this.find(".error button").addEventListener("click", () => this.retry());
    this.find(".explain").addEventListener("click", () => this.explain());
    this.find("select").addEventListener("change", () => this.explain());
    this.find("input").addEventListener("input", () => this.setOpacity());
    this.find(".curl button").addEventListener("click", (event) => this.copy(event.currentTarget));
    this.find(".curl button").hidden = !navigator.clipboard; // there is none without HTTPS, localhost excepted
    element("results").prepend(this.card);
  }

  find(selector) {
    return this.card.querySelector(selector);
  }

  showImage() {
    const image = this.find(".frame img");
    image.addEventListener("load", () => {
      const ratio = image.naturalWidth / image.naturalHeight;
      this.find(".frame").style.aspectRatio = ratio;
      this.find(".frame").style.width = `min(100%, ${28 * ratio}rem)`;
      image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= 96);
      this.placeMap();
    });
    image.addEventListener("error", () => {
      this.find(".frame").hidden = true;
      this.find(".unseen").hidden = false;
      this.find(".explain").hidden = true; // a map would lie over nothing
    });
    image.src = URL.createObjectURL(this.file);
  }

  async send() {
    const began = performance.now();
    const sentKey = key;
    try {
      const [answer, headers] = await post("predict", this.file);
      this.show(answer, timing(headers.get("Server-Timing")), performance.now() - began);
    } catch (failure) {
      if (failure.status === 401 && key !== sentKey) enqueue(() => this.send()); // there is another one by now
      else this.fail(failure);
    }
  }

  retry() {
    this.find(".error").hidden = true;
    this.find("h2").textContent = "…";
    this.focusHeading();
    enqueue(() => this.send());
  }

  /** Where the focus goes when what had it disappears. */
  focusHeading() {
    this.find("h2").tabIndex = -1;
    this.find("h2").focus();
  }

  fail(failure) {
    if (!(failure instanceof Failure)) throw failure;
    this.find("h2").textContent = "No answer";
    this.find(".error").hidden = false;
    this.find(".error p").textContent = failure.message;
    this.find(".code").textContent = failure.code;
    this.find(".error button").hidden = !failure.mayPass;
    say(`${this.file.name}: ${failure.message}`);
    if (failure.status === 401) askForKey(this);
  }

  show(answer, times, roundTrip) {
    const { top, unfamiliar = false } = answer.predictions[0];
    this.find(".error").hidden = true;
    this.find("h2").textContent = shown(top[0].label);
    if (keyForm.contains(document.activeElement)) this.focusHeading();
    if (!refused.length) keyForm.hidden = true;
    this.find(".frame img").alt = `${this.file.name}, as it was sent`;
    this.find(".unfamiliar").hidden = !unfamiliar;
    this.find(".top").replaceChildren(...top.map(bar));
    this.find("select").replaceChildren(...top.map(({ label }) => new Option(shown(label), label)));
    const parts = times ? PARTS : [];
    this.find(".times").replaceChildren(
      ...parts.map(([part, words]) => term(part, words, times[part])),
      ...(times ? [term("total", "total", times.total)] : []),
      term("network", "with the network", roundTrip),
    );
    this.find(".time").replaceChildren(...parts.map(([part]) => {
      const piece = document.createElement("b");
      piece.className = part;
      piece.style.width = `${times[part] / times.total * 100}%`;
      return piece;
    }));
    this.find(".curl code").textContent = curlCommand(this.file.name);
    this.find(".version").textContent = `Answered by ${answer.model}, version ${answer.version}.`;
    this.find(".more").hidden = false;
    this.card.scrollIntoView({ block: "nearest" });
    const doubt = unfamiliar ? " It is unlike anything the model was trained on." : "";
    say(`${this.file.name}: ${shown(top[0].label)}, ${percent(top[0].probability)}.${doubt}`);
    const explainable = explains && this.find(".unseen").hidden;
    this.find(".explain").hidden = !explainable;
    if (this.explainAtOnce && explainable) this.explain();
  }

  async explain() {
    this.asked?.abort(); // the service stops when a client leaves
    const { signal } = this.asked = new AbortController();
    const label = this.find("select").value;
    const button = this.find(".explain");
    const words = this.find(".map-words");
    const hadFocus = document.activeElement === button;
    button.hidden = true;
    words.hidden = false;
    words.textContent = `Looking for the regions that carry “${shown(label)}” …`;
    this.card.setAttribute("aria-busy", "true");
    try {
      const [answer] = await post(`explain?label=${encodeURIComponent(label)}`, this.file, signal);
      words.hidden = true;
      this.showMap(answer, hadFocus);
    } catch (failure) {
      if (!(failure instanceof Failure)) throw failure;
      if (signal.aborted) return;
      if ([403, 404, 405, 501].includes(failure.status)) { // off, or a service that can't
        explains = false;
        words.hidden = true;
        for (const other of document.querySelectorAll(".explain")) other.hidden = true;
      } else {
        words.textContent = `No heat map: ${failure.message}`;
        button.hidden = false;
      }
    } finally {
      if (!signal.aborted) this.card.removeAttribute("aria-busy");
    }
  }

  showMap(answer, focus) {
    const { label, map } = answer.explanations[0];
    const low = Math.min(...map.flat());
    const high = Math.max(...map.flat());
    const [rows, columns] = answer.input_size;
    this.seenRatio = answer.crop === "center" ? columns / rows : null;
    drawMap(this.find("canvas"), map, low, high);
    this.find("canvas").hidden = false;
    this.placeMap();
    this.setOpacity();
    const points = (value) => `${value < 0 ? "−" : ""}${Math.abs(value * 100).toFixed(1)}`;
    this.find(".low").textContent = points(low);
    this.find(".high").textContent = `${points(high)} points`;
    const words = `The brighter a region, the more “${shown(label)}” loses when it is covered: most ${strongest(map)}.`;
    this.find(".words").textContent = words;
    this.find(".map").hidden = false;
    if (focus) this.find("input").focus();
    say(words);
  }

  /** Lay the map over the region that the model sees: the largest centred one of its aspect ratio. */
  placeMap() {
    const image = this.find(".frame img");
    if (this.seenRatio === undefined || !image.naturalWidth) return;
    const own = image.naturalWidth / image.naturalHeight;
    const seen = this.seenRatio ?? own;
    const width = Math.min(1, seen / own);
    const height = Math.min(1, own / seen);
    Object.assign(this.find("canvas").style, {
      width: `${width * 100}%`,
      height: `${height * 100}%`,
      left: `${(1 - width) * 50}%`,
      top: `${(1 - height) * 50}%`,
    });
  }

  setOpacity() {
    const slider = this.find("input");
    slider.setAttribute("aria-valuetext", `${slider.value} %`);
    this.find("canvas").style.opacity = slider.value / 100;
    this.find(".frame img").style.filter = `grayscale(${slider.value}%)`; // or its colours would mix with the map's
  }

  async copy(button) {
    try {
      await navigator.clipboard.writeText(this.find(".curl code").textContent);
      button.textContent = "Copied";
      say("The command is copied.");
    } catch {
      say("The browser does not let this page copy.");
    }
  }
}

function bar({ label, probability }) {
  const item = document.createElement("li");
  const name = document.createElement("span");
  const value = document.createElement("data");
  const track = document.createElement("i");
  const fill = document.createElement("b");
  name.textContent = shown(label);
  value.value = probability;
  value.textContent = percent(probability);
  fill.style.width = percent(probability).replace(" ", "");
  track.append(fill);
  item.append(name, " ", value, track);
  return item;
}

function term(part, words, value) {
  const group = document.createElement("div");
  const name = document.createElement("dt");
  const time = document.createElement("dd");
  group.className = part;
  name.textContent = words;
  time.textContent = milliseconds(value);
  group.append(name, time);
  return group;
}

/** Draw a grid of numbers in viridis; the browser smooths it as it is scaled. */
function drawMap(canvas, map, low, high) {
  const SIDE = 384;
  const [rows, columns] = [map.length, map[0].length];
  const small = new OffscreenCanvas(columns, rows);
  const pixels = new ImageData(columns, rows);
  map.flat().forEach((value, index) => {
    const at = high > low ? (value - low) / (high - low) * (VIRIDIS.length - 1) : 0;
    const [from, to] = [VIRIDIS[Math.floor(at)], VIRIDIS[Math.ceil(at)]];
    pixels.data.set([...from.map((channel, c) => channel + (to[c] - channel) * (at % 1)), 255], index * 4);
  });
  small.getContext("2d").putImageData(pixels, 0, 0);
  canvas.width = canvas.height = SIDE;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, SIDE, SIDE);
}

// ---- What the user does

function classify(files) {
  if (!files.length) {
    say("There is no file in what was dropped.");
    return;
  }
  say(files.length === 1 ? `Sending ${files[0].name} …` : `Sending ${files.length} images …`);
  const results = [...files].map((file) => new Result(file, files.length === 1));
  for (const result of results) enqueue(() => result.send());
}

function askForKey(result) {
  refused.push(result);
  element("key-words").textContent = key
    ? "The service does not accept this key."
    : "This service asks for a key. It stays on this page, and is forgotten with it.";
  const isNew = keyForm.hidden;
  keyForm.hidden = false;
  if (isNew || keyForm.contains(document.activeElement)) keyInput.select();
}

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  key = keyInput.value;
  const again = refused;
  refused = [];
  for (const result of again) enqueue(() => result.send());
});

element("files").addEventListener("change", (event) => {
  classify([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
});

for (const button of document.querySelectorAll("#examples button")) {
  button.addEventListener("click", async () => {
    const image = button.querySelector("img");
    try {
      const content = await (await fetch(image.src)).blob();
      classify([new File([content], button.dataset.name, { type: content.type })]);
    } catch {
      say("The example can't be loaded.");
    }
  });
}

document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) classify([...event.clipboardData.files]);
});

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  classify([...event.dataTransfer.files]);
});

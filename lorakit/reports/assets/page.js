// Assembles the page, and keeps it up to date where a server follows a run.
const MOST_SHOWN = 8;
const read = (root) => JSON.parse(root.getElementById("data").textContent);
let data = read(document);
const hidden = new Set(data.runs.slice(MOST_SHOWN).map((run) => run.name));
const state = { smoothing: 0.6, log: false, runs: data.runs, isShown: (run) => !hidden.has(state.runs[run].name) };
const figures = new Map();
const section = document.getElementById("charts");
const legend = make("fieldset", { class: "legend" });
const grid = make("div", { class: "charts" });

function controls() {
  const weight = make("output", {}, String(state.smoothing));
  const slider = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: state.smoothing });
  const log = make("input", { type: "checkbox" });
  slider.addEventListener("input", () => {
    state.smoothing = Number(slider.value);
    weight.textContent = slider.value;
    redraw();
  });
  log.addEventListener("change", () => {
    state.log = log.checked;
    redraw();
  });
  return make("p", { class: "controls" }, make("label", {}, "Smoothing ", slider, weight), make("label", {}, log, " Logarithmic loss and gradient norm"));
}

function fillLegend() {
  legend.replaceChildren(make("legend", {}, "Runs"), ...data.runs.map((run, at) => {
    const box = make("input", { type: "checkbox" });
    box.checked = !hidden.has(run.name);
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(run.name);
      else hidden.add(run.name);
      redraw();
    });
    return make("label", {}, box, make("span", { class: `swatch c${at % COLORS}` }), run.name);
  }));
  legend.hidden = data.runs.length < 2;
}

function redraw() {
  state.runs = data.runs;
  for (const chart of data.charts) {
    if (!figures.has(chart.title)) {
      figures.set(chart.title, chartFigure(chart.title));
      grid.append(figures.get(chart.title).figure);
    }
    figures.get(chart.title).update(chart, state);
  }
}

function drawRanks() {
  for (const place of document.querySelectorAll(".rank-map")) {
    const map = data.ranks.find((each) => String(each.run) === place.dataset.run);
    if (map) rankMap(place, map);
  }
}

const sections = () => [...document.querySelectorAll("main > section")].filter((each) => each !== section);
const served = new Map(sections().map((each) => [each.id, each.innerHTML]));

// Replace the sections that have changed; what the reader has opened stays open.
function replaceSections(page) {
  for (const old of sections()) {
    const fresh = page.getElementById(old.id);
    if (!fresh || fresh.innerHTML === served.get(old.id)) continue;
    served.set(old.id, fresh.innerHTML);
    const open = new Map([...old.querySelectorAll("details")].map((each, at) => [at, each.open]));
    old.replaceChildren(...fresh.childNodes);
    old.querySelectorAll("details").forEach((each, at) => {
      if (open.has(at)) each.open = open.get(at);
    });
    if (old.id === "ranks") drawRanks();
  }
}

function follow(seconds) {
  const status = document.getElementById("state");
  let tag = null;
  async function refresh() {
    try {
      const answer = await fetch(location.pathname, { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.status === 200) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        const names = data.runs.map((run) => run.name).join("\n");
        tag = answer.headers.get("ETag");
        data = read(page);
        if (data.runs.map((run) => run.name).join("\n") !== names) fillLegend();
        replaceSections(page);
        redraw();
      }
      const failed = answer.status !== 200 && answer.status !== 304;
      status.textContent = failed ? `The server answered ${answer.status}.` : "Live";
    } catch {
      status.textContent = "The server has ended; this is its last page.";
    }
    setTimeout(refresh, seconds * 1000);
  }
  refresh();
}

if (data.charts.length) {
  section.append(controls(), legend, grid);
  fillLegend();
} else {
  section.append(make("p", {}, "No numbers yet."));
}
drawRanks();
redraw();
new ResizeObserver(() => figures.forEach((each) => each.redraw())).observe(grid);
const live = document.querySelector('meta[name="lorakit-live"]');
if (live) follow(Number(live.content));

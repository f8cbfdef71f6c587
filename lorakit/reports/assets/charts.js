// Charts as SVG. Text from runs only ever becomes text nodes and attribute values.
const NAMESPACE = "http://www.w3.org/2000/svg";
const MOST_POINTS = 40;
const MARGIN = { top: 10, right: 20, bottom: 38, left: 64 };
const HEIGHT = 250;
const COLORS = 8;

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

const make = (name, attributes = {}, ...children) =>
  fill(document.createElement(name), attributes, children);
const draw = (name, attributes = {}, ...children) =>
  fill(document.createElementNS(NAMESPACE, name), attributes, children);

function formatted(value, digits = 4) {
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en-US");
  const rounded = Number(value.toPrecision(digits));
  return size >= 1e5 || (size > 0 && size < 1e-3) ? rounded.toExponential() : String(rounded);
}

// All in one notation, exponents if one of them needs one,
// and with as many digits as tell them apart.
function tickTexts(ticks) {
  const isSmall = ticks.some((tick) => tick !== 0 && Math.abs(tick) < 1e-3);
  for (let digits = 4; ; digits += 1) {
    const texts = ticks.map((tick) =>
      isSmall && tick !== 0 ? Number(tick.toPrecision(digits)).toExponential() : tickText(tick, digits));
    if (digits >= 15 || new Set(texts).size === ticks.length) return texts;
  }
}

function tickText(value, digits) {
  const size = Math.abs(value);
  if (size >= 1e4 && size < 1e6) return `${Number((value / 1e3).toPrecision(digits))}k`;
  if (size >= 1e6 && size < 1e9) return `${Number((value / 1e6).toPrecision(digits))}M`;
  return formatted(value, digits);
}

// An exponential moving average, as if it had started long before the first value.
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function linearTicks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const ticks = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + 1e-9 * step; at += 1) {
    ticks.push(Number((at * step).toPrecision(12)));
  }
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  const first = Math.floor(Math.log10(low) + 1e-9), last = Math.log10(high) + 1e-9;
  for (let power = first; power <= last; power += Math.ceil((last - first) / 10) || 1) {
    for (const factor of high / low > 1000 ? [1] : [1, 2, 5]) {
      const tick = Number(`${factor}e${power}`);
      if (tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9)) ticks.push(tick);
    }
  }
  return ticks.length > 1 ? ticks : linearTicks(low, high, 4);
}

function scale(low, high, from, to, isLog) {
  const [a, b] = isLog ? [Math.log(low), Math.log(high)] : [low, high];
  return (value) => from + (((isLog ? Math.log(value) : value) - a) / (b - a || 1)) * (to - from);
}

// The lines of a curve: what is drawn in full, and what faintly behind it.
function linesOf(curve, chart, state) {
  const smooths = chart.smooth && !curve.points && state.smoothing > 0 && curve.x.length > 10;
  if (!smooths) return { x: curve.x, y: curve.y, faint: null };
  const x = curve.mx || curve.x;
  return { x, y: smoothed(curve.my || curve.y, state.smoothing), faint: curve };
}

// Beyond the values on both sides, but not past 0, or 1 for a score, which cannot be beyond either.
function bounds(values, padding, isLog, isScore) {
  let low = Infinity, high = -Infinity;
  for (const list of values) for (const value of list) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (isLog) return low === high ? [low / 1.1, high * 1.1] : [low, high];
  const margin = low === high ? Math.abs(low) * 0.1 || 1 : padding * (high - low);
  const least = low >= 0 ? 0 : -Infinity, most = isScore && high <= 1 ? 1 : Infinity;
  return [Math.max(low - margin, least), Math.min(high + margin, most)];
}

const pathOf = (x, y, toX, toY) =>
  x.map((step, at) => `${at ? "L" : "M"}${toX(step).toFixed(1)} ${toY(y[at]).toFixed(1)}`).join("");

function axes(chart, plot, toX, toY, xTicks, yTicks) {
  const { left, right, top, bottom } = plot;
  const middle = (top + bottom) / 2;
  const [xTexts, yTexts] = [tickTexts(xTicks), tickTexts(yTicks)];
  return [
    ...yTicks.map((tick) => draw("line", { class: "grid", x1: left, x2: right, y1: toY(tick), y2: toY(tick) })),
    ...yTicks.map((tick, at) => draw("text", { x: left - 6, y: toY(tick) + 4, "text-anchor": "end" }, yTexts[at])),
    ...xTicks.map((tick, at) => draw("text", { x: toX(tick), y: bottom + 16, "text-anchor": "middle" }, xTexts[at])),
    draw("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    draw("text", { x: (left + right) / 2, y: bottom + 33, "text-anchor": "middle" }, "step"),
    draw("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, chart.unit || chart.title.toLowerCase()),
  ];
}

function curveNodes(curve, chart, state, toX, toY) {
  const lines = linesOf(curve, chart, state);
  const color = `c${curve.run % COLORS}`;
  const dash = curve.run >= COLORS ? " dash2" : curve.style ? " dash" : "";
  const nodes = [];
  if (lines.faint) nodes.push(draw("path", { class: `line faint ${color}`, d: pathOf(lines.faint.x, lines.faint.y, toX, toY) }));
  nodes.push(draw("path", { class: `line ${color}${dash}`, d: pathOf(lines.x, lines.y, toX, toY) }));
  if ((curve.points && curve.x.length <= MOST_POINTS) || curve.x.length === 1) {
    nodes.push(...curve.x.map((step, at) => draw("circle", { class: `point ${color}`, cx: toX(step), cy: toY(curve.y[at]), r: 3 })));
  }
  return nodes;
}

function nameOf(curve, state) {
  return curve.label ? `${state.runs[curve.run].name}, ${curve.label}` : state.runs[curve.run].name;
}

// A figure that draws itself again with update(chart, state).
function chartFigure(title) {
  const place = make("div", { class: "plot", tabindex: "0", role: "group" });
  const readout = make("p", { class: "readout", "aria-live": "polite" });
  const rows = make("div", { class: "scroll" });
  const details = make("details", {}, make("summary", {}, "Table"), rows);
  const key = make("small");
  const figure = make("figure", {}, make("figcaption", {}, title, key), place, readout, details);
  let chart = null, state = null, geometry = null, cursor = null;

  function redraw() {
    const curves = chart.curves.filter((curve) => state.isShown(curve.run));
    const width = Math.max(place.clientWidth, 240);
    figure.hidden = curves.length === 0;
    if (!curves.length) return;
    const isLog = state.log && chart.log && curves.every((c) => c.y.every((value) => value > 0));
    const plot = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: HEIGHT - MARGIN.bottom };
    const lastStep = Math.max(1, ...chart.curves.map((c) => c.x[c.x.length - 1]));
    const [low, high] = bounds(curves.map((c) => c.y), 0.05, isLog, chart.unit === "evaluation");
    const toX = scale(0, lastStep, plot.left, plot.right, false);
    const toY = scale(low, high, plot.bottom, plot.top, isLog);
    const xTicks = linearTicks(0, lastStep, Math.max(3, Math.floor(width / 75))).filter(Number.isInteger);
    const yTicks = isLog ? logTicks(low, high) : linearTicks(low, high, 5);
    const marker = draw("line", { class: "cursor", y1: plot.top, y2: plot.bottom, visibility: "hidden" });
    const summary = curves.map((c) => `${nameOf(c, state)}: ${formatted(c.y[c.y.length - 1])} at step ${c.x[c.x.length - 1]}`);
    const labels = ["solid", "dashed"].map((look, style) => [look, chart.curves.find((c) => c.style === style)]);
    const isOne = labels.some(([, curve]) => !curve);
    key.textContent = isOne ? "" : labels.map(([look, curve]) => `${look}: ${curve.label}`).join(", ");
    place.setAttribute("aria-label", `${chart.title}; arrow keys read values`);
    place.replaceChildren(draw("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `${chart.title}. ${summary.join("; ")}` },
      ...axes(chart, plot, toX, toY, xTicks, yTicks),
      ...curves.flatMap((curve) => curveNodes(curve, chart, state, toX, toY)), marker));
    geometry = { curves, toX, width, marker, steps: [...new Set(curves.flatMap((c) => linesOf(c, chart, state).x))].sort((a, b) => a - b) };
    if (details.open) fillTable();
    show(cursor);
  }

  function show(step) {
    cursor = step;
    if (!geometry || step === null) {
      if (geometry) geometry.marker.setAttribute("visibility", "hidden");
      readout.textContent = "";
      return;
    }
    const at = geometry.toX(step);
    geometry.marker.setAttribute("visibility", "visible");
    geometry.marker.setAttribute("x1", at);
    geometry.marker.setAttribute("x2", at);
    const values = geometry.curves.map((curve) => {
      const lines = linesOf(curve, chart, state);
      const place = nearest(lines.x, step);
      return `${nameOf(curve, state)} ${formatted(lines.y[place])}`;
    });
    readout.textContent = `step ${formatted(step)}: ${values.join("; ")}`;
  }

  function fillTable() {
    const head = ["curve", "first", "last", "lowest", "at step", "highest", "at step"];
    const body = geometry.curves.map((curve) => {
      const low = curve.y.indexOf(Math.min(...curve.y)), high = curve.y.indexOf(Math.max(...curve.y));
      const cells = [curve.y[0], curve.y[curve.y.length - 1], curve.y[low], curve.x[low], curve.y[high], curve.x[high]];
      return make("tr", {}, make("th", { scope: "row" }, nameOf(curve, state)), ...cells.map((value) => make("td", {}, formatted(value))));
    });
    rows.replaceChildren(make("table", { class: "numbers" },
      make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))), make("tbody", {}, ...body)));
  }

  place.addEventListener("pointermove", (event) => {
    if (!geometry) return;
    const box = place.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * geometry.width;
    show(geometry.steps[nearest(geometry.steps.map(geometry.toX), x)]);
  });
  place.addEventListener("pointerleave", () => show(null));
  place.addEventListener("blur", () => show(null));
  place.addEventListener("keydown", (event) => {
    const steps = geometry ? geometry.steps : [];
    const at = cursor === null ? -1 : nearest(steps, cursor);
    const next = { ArrowRight: at + 1, ArrowLeft: at < 0 ? steps.length - 1 : at - 1, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") show(null);
    if (next === undefined || !steps.length) return;
    event.preventDefault();
    show(steps[Math.min(Math.max(next, 0), steps.length - 1)]);
  });
  details.addEventListener("toggle", () => details.open && geometry && fillTable());
  return {
    figure,
    redraw: () => chart && redraw(),
    update(newChart, newState) {
      [chart, state] = [newChart, newState];
      redraw();
    },
  };
}

// The place of the value closest to the wanted one in an ascending list.
function nearest(values, wanted) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= wanted) low = middle;
    else high = middle;
  }
  return Math.abs(values[high] - wanted) < Math.abs(values[low] - wanted) ? high : low;
}

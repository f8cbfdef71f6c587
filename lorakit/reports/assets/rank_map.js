// The ranks of a run as a map of layers and matrices, at the step that a slider chooses.
const CELL = { width: 46, height: 20, left: 44 };
const LETTER = 7;
const FRAME_MILLISECONDS = 350;

function rankMap(place, map) {
  const last = map.frames.length - 1;
  const most = Math.max(1, ...map.frames.flatMap(([, ranks]) => ranks));
  const slider = make("input", { type: "range", min: 0, max: last, value: last, "aria-label": "Allocation" });
  const output = make("output", {});
  const play = make("button", { type: "button" }, "Play");
  const cells = new Map();
  map.cells.forEach(([row, column], at) => {
    const key = `${row},${column}`;
    cells.set(key, { row, column, places: [...(cells.get(key)?.places || []), at] });
  });
  const nameWidth = LETTER * Math.max(...map.columns.map((name) => name.length));
  const width = CELL.left + map.columns.length * CELL.width + 0.8 * nameWidth;
  const height = map.rows.length * CELL.height + 0.6 * nameWidth + 24;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  const boxes = [...cells.values()].map((cell) => {
    const x = CELL.left + cell.column * CELL.width, y = 4 + cell.row * CELL.height;
    const box = draw("rect", { class: "heat", x, y, width: CELL.width - 2, height: CELL.height - 2 });
    const text = draw("text", { x: x + CELL.width / 2 - 1, y: y + 13, "text-anchor": "middle" });
    svg.append(box, text);
    return { box, text, places: cell.places };
  });
  const foot = 4 + map.rows.length * CELL.height;
  map.rows.forEach((row, at) => svg.append(draw("text", { x: CELL.left - 6, y: 17 + at * CELL.height, "text-anchor": "end" }, row)));
  map.columns.forEach((name, at) => {
    const x = CELL.left + (at + 0.5) * CELL.width, y = foot + 12;
    svg.append(draw("text", { x: x - 6, y, transform: `rotate(35 ${x - 6} ${y})` }, name));
  });
  const middle = foot / 2;
  svg.append(draw("text", { x: 11, y: middle, "text-anchor": "middle", transform: `rotate(-90 11 ${middle})` }, "layer"));

  function show() {
    const [step, ranks] = map.frames[Number(slider.value)];
    for (const { box, text, places } of boxes) {
      const mean = places.reduce((sum, at) => sum + ranks[at], 0) / places.length;
      box.setAttribute("fill-opacity", (0.06 + 0.94 * (mean / most)).toFixed(3));
      text.textContent = Number.isInteger(mean) ? mean : mean.toFixed(1);
      text.setAttribute("class", mean / most > 0.5 ? "on-heat" : "in-heat");
    }
    const total = ranks.reduce((sum, rank) => sum + rank, 0);
    output.textContent = `step ${formatted(step)}, total rank ${formatted(total)}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    svg.setAttribute("aria-label", `Ranks by layer and matrix, ${output.textContent}`);
  }

  let timer = null;
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  function advance() {
    if (Number(slider.value) >= last) return stop();
    slider.value = Number(slider.value) + 1;
    show();
  }
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) >= last) slider.value = 0;
    show();
    play.textContent = "Pause";
    timer = setInterval(advance, FRAME_MILLISECONDS);
  });
  slider.addEventListener("input", () => {
    stop();
    show();
  });
  show();
  const controls = last > 0 ? [make("p", { class: "controls" }, play, slider, output)] : [];
  place.replaceChildren(...controls, make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Ranks" }, svg));
}

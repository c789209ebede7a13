// Shows the values under the pointer. The page is complete without it: every picture has titles,
// and a table of its numbers. Everything is set as text, never as markup.
"use strict";

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);

function readable(value) {
  if (value === null) return "not finite";
  return Math.abs(value) >= 1000 ? value.toLocaleString("en-US") : String(value);
}

// Index of the entry of sorted `steps` that is closest to `wanted`.
function nearest(steps, wanted) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] < wanted) low = middle;
    else high = middle;
  }
  return wanted - steps[low] <= steps[high] - wanted ? low : high;
}

// What to show at a point of a line chart: a vertical line, and the value of every curve there.
function findOnCurves({ x: [first, last, left, right], y: [top, bottom], name, lines }, point) {
  if (point.x < left || point.x > right) return null;
  const wanted = first + ((point.x - left) / (right - left)) * (last - first);
  const found = lines.map(({ label, steps, values }) => {
    const i = nearest(steps, wanted);
    return { label, step: steps[i], value: values[i] };
  });
  const distance = ({ step }) => Math.abs(step - wanted);
  const { step } = found.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  const x = left + ((step - first) / (last - first)) * (right - left);
  const text = found.map(
    (each) =>
      `${each.label}: ${readable(each.value)}` +
      (each.step === step ? "" : ` (${name} ${each.step.toLocaleString("en-US")})`),
  );
  return { outline: `M${x} ${top}V${bottom}`, text: [`${name} ${step.toLocaleString("en-US")}`, ...text] };
}

// What to show at a point of a heatmap: the cell's outline, names and value. One cell is one unit;
// groups of `size` columns have `gap` units between them.
function findOnCells({ rows, columns, values, size, gap, percent }, point) {
  const group = Math.floor(point.x / (size + gap));
  const x = group * (size + gap), inside = Math.floor(point.x - x);
  const row = Math.floor(point.y), column = group * size + inside;
  if (inside >= size || !(row in rows) || !(column in columns)) return null;
  const value = values[row][column];
  const shown = percent ? `${Number((100 * value).toPrecision(3))}%` : readable(value);
  return {
    outline: `M${x + inside} ${row}h1v1h-1z`,
    text: [`${rows[row]}, ${columns[column]}`, value === null ? "no value" : shown],
  };
}

function follow(plot, kind, find) {
  const svg = plot.ownerSVGElement ?? plot;
  const cursor = plot.appendChild(document.createElementNS(svg.namespaceURI, "path"));
  cursor.setAttribute("class", "cursor");
  let data = null;
  const hide = () => {
    tip.hidden = true;
    cursor.removeAttribute("d");
  };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    if (data === null) {
      data = JSON.parse(plot.dataset[kind]);
      // The browser would show them on top of ours.
      for (const title of svg.querySelectorAll("title")) title.remove();
    }
    const place = new DOMPoint(event.clientX, event.clientY);
    const found = find(data, place.matrixTransform(plot.getScreenCTM().inverse()));
    if (found === null) return hide();
    cursor.setAttribute("d", found.outline);
    tip.textContent = found.text.join("\n");
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(Math.min(event.clientX + 14, room), 0)}px`;
    tip.style.top = `${event.clientY + 18}px`;
  });
}

for (const [kind, find] of [["curves", findOnCurves], ["cells", findOnCells]])
  for (const plot of document.querySelectorAll(`[data-${kind}]`)) follow(plot, kind, find);

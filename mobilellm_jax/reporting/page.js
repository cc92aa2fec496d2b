"use strict";
const data = JSON.parse(document.getElementById("numbers").textContent);
const [first, last] = data.domain;
const plots = [...document.querySelectorAll(".plot")];
const number = (v) => (v === null || v === undefined ? "–" : Number(v).toLocaleString("en", { maximumSignificantDigits: 4 }));

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return step - steps[low] <= steps[high] - step ? low : high;
}

function cell(row, text, name) {
  const span = row.appendChild(document.createElement("span"));
  span.textContent = text;
  if (name) span.className = name;
  return span;
}

// Points all charts at one step; the chart under the pointer also tells its values there.
function point(active, share) {
  const step = first + share * (last - first);
  for (const plot of plots) {
    const chart = data.charts[plot.dataset.chart], axis = data.axes[chart.axis];
    const i = nearest(axis.step, step), at = (axis.step[i] - first) / Math.max(last - first, 1);
    plot.querySelector(".cross").hidden = false;
    plot.querySelector(".cross").style.left = `${100 * at}%`;
    const tip = plot.querySelector(".tip");
    tip.hidden = plot !== active;
    if (tip.hidden) continue;
    tip.replaceChildren();
    cell(tip.appendChild(document.createElement("b")), `step ${axis.step[i].toLocaleString("en")} · ${axis.tokens[i]} tokens`).style.position = "static";
    const rows = tip.appendChild(document.createElement("div"));
    chart.lines.forEach((line, n) => {
      if (plot.querySelectorAll("g.line")[n].classList.contains("off")) return;
      const name = cell(rows, line.name);
      const swatch = document.createElement("i");
      swatch.className = "swatch";
      swatch.style.background = `var(--c${line.colour})`;
      name.prepend(swatch);
      cell(rows, number(line.centre[i]));
      cell(rows, line.low.length && line.low[i] !== null ? (line.low[i] === line.high[i] ? `raw ${number(line.low[i])}` : `raw ${number(line.low[i])} to ${number(line.high[i])}`) : "", "range");
    });
    for (const mark of data.marks) if (Math.abs(mark.at - at) < 0.006) cell(tip.appendChild(document.createElement("div")), `${mark.kind} at step ${mark.step.toLocaleString("en")}`);
    const right = at < 0.5;
    tip.style.left = right ? `calc(${100 * at}% + 12px)` : "auto";
    tip.style.right = right ? "auto" : `calc(${100 - 100 * at}% + 12px)`;
  }
}

for (const plot of plots) {
  const move = (event) => {
    const box = plot.getBoundingClientRect();
    point(plot, Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
  };
  plot.addEventListener("pointermove", move);
  plot.addEventListener("pointerdown", move);
  plot.addEventListener("pointerleave", () => document.querySelectorAll(".cross, .tip").forEach((e) => (e.hidden = true)));
  plot.closest("figure").querySelectorAll(".legend button").forEach((button, n) =>
    button.addEventListener("click", () => {
      const off = plot.querySelectorAll("g.line")[n].classList.toggle("off");
      plot.querySelectorAll("g.back")[n].classList.toggle("off", off);
      button.setAttribute("aria-pressed", String(!off));
    }));
}

const filter = document.getElementById("filter");
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  document.querySelectorAll(".config tr").forEach((row) => (row.hidden = !words.every((w) => row.dataset.text.includes(w))));
  document.querySelectorAll(".config details").forEach((group) => {
    group.hidden = words.length > 0 && !group.querySelector("tr:not([hidden])");
    if (words.length) group.open = true;
  });
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));

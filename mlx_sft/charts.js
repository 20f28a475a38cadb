"use strict";
// Tells the values of a chart where the pointer is. They are computed from what is drawn; nothing of it becomes markup.
const tellValues = () => document.querySelectorAll("svg[data-scale]").forEach((svg) => {
  const [x0, x1, xPowers, y0, y1, yPowers, left, right, foot, top] = svg.dataset.scale.split(" ").map(Number);
  const value = (share, low, high, powers) => { const at = low + share * (high - low); return powers ? 10 ** at : at; };
  const xOf = (pixel) => value((pixel - left) / (right - left), x0, x1, xPowers);
  const yOf = (pixel) => value((foot - pixel) / (foot - top), y0, y1, yPowers);
  const series = [...svg.querySelectorAll("g[data-name]")].map((group) => {
    const line = group.querySelector("polyline");
    const points = line ? line.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number))
      : [...group.querySelectorAll("circle:not(.ring)")].map((dot) => [Number(dot.getAttribute("cx")), Number(dot.getAttribute("cy"))]);
    return { name: group.dataset.name, points };
  }).filter((one) => one.points.length);
  if (!series.length) return;
  const told = document.createElement("p");
  told.className = "told";
  svg.after(told);
  const hair = document.createElementNS("http://www.w3.org/2000/svg", "path");
  hair.setAttribute("class", "hair");
  svg.append(hair);
  const shown = (number) => Number(number.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const pixel = Math.min(right, Math.max(left, (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width));
    hair.setAttribute("d", `M${pixel} ${top}V${foot}`);
    const near = (points) => points.reduce((best, point) => Math.abs(point[0] - pixel) < Math.abs(best[0] - pixel) ? point : best);
    const values = series.map((one) => `${one.name} ${shown(yOf(near(one.points)[1]))}`);
    told.textContent = `${Math.round(xOf(pixel)).toLocaleString("en")}: ${values.join(" · ")}`;
  });
  svg.addEventListener("pointerleave", () => { told.textContent = ""; hair.removeAttribute("d"); });
});
tellValues();

/* Two plugins, and what the matrix says of them; window.MATRIX comes from the build. */
"use strict";

function together(box) {
  const { plugins, words, cells, reasons, stacks } = window.MATRIX;
  const asked = new URLSearchParams(location.search), form = document.createElement("form");
  const select = (name, given) => {
    const label = document.createElement("label"), found = document.createElement("select");
    label.textContent = name;
    for (const plugin of [...plugins].sort()) found.add(new Option(plugin, plugin));
    found.value = plugins.includes(given) ? given : found.value;
    label.append(found);
    form.append(label);
    return found;
  };
  const first = select("first in the stack", asked.get("first") || "lora");
  const second = select("second", asked.get("second") || "nf4");
  const said = document.createElement("div");
  said.setAttribute("aria-live", "polite");
  box.append(form, said);

  function line(text, className) {
    const found = document.createElement("p");
    found.textContent = text;
    if (className) found.className = className;
    said.append(found);
  }
  function show() {
    said.textContent = "";
    const cell = cells[plugins.indexOf(first.value) * plugins.length + plugins.indexOf(second.value)];
    line(cell ? words[cell[0]] : "not tried", "outcome");
    if (!cell) return;
    const [, reason, claims, order, stack, model] = cell;
    if (reason !== null) line(reasons[reason]);
    if (claims.length) line(`Claims: ${claims.join(", ")}.`);
    if (order.length) line(`This order works: ${order.join(", ")}.`);
    if (stack !== null) line(`Trained, saved, loaded bit for bit and run on a tiny ${model}, in the stack ${stacks[stack]}.`);
    history.replaceState(null, "", `?first=${first.value}&second=${second.value}`);
  }
  form.addEventListener("input", show);
  show();
}

document.querySelectorAll(".pair").forEach(together);

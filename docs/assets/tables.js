/* On a phone a row of a wide table is a card (site.css), in which each cell says what it is of. A table in <div class="filtered" data-by="hook, family"> gets a choice for each named column, and a field for words.
   The choice is kept in the address, as in ?hook=decode: links lead to a filtered table. Nothing is asked of any host. */
"use strict";

function add(to, tag, attributes, text) {
  const element = document.createElement(tag);
  Object.assign(element, attributes);
  if (text !== undefined) element.textContent = text;
  to.append(element);
  return element;
}

function labelled(table) {
  const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
  if (names.length < 3) return;
  table.dataset.cards = "";
  for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, i) => { if (i && names[i]) cell.dataset.of = names[i]; });
}

function filtered(box) {
  const table = box.querySelector("table");
  const names = [...table.querySelectorAll("th")].map((cell) => cell.textContent.trim());
  const rows = [...table.querySelectorAll("tbody tr")].map((row) => ({
    row, cells: [...row.cells].map((cell) => cell.textContent.trim()),
  }));
  const asked = new URLSearchParams(location.search);
  const form = document.createElement("form");
  form.onsubmit = (event) => event.preventDefault();
  const values = (cell) => cell.split(", ").filter(Boolean);
  const choices = values(box.dataset.by).map((name) => {
    const column = names.indexOf(name), select = add(add(form, "label", {}, name), "select", { name });
    add(select, "option", { value: "" }, "all");
    const found = new Set(rows.flatMap(({ cells }) => values(cells[column])));
    for (const value of [...found].sort()) add(select, "option", { value }, value);
    select.value = found.has(asked.get(name)) ? asked.get(name) : "";
    return { name, column, select };
  });
  const words = add(add(form, "label", {}, "words"), "input", { type: "search", value: asked.get("words") || "" });
  const count = add(form, "output", {});
  table.closest(".md-typeset__scrollwrap, .md-typeset__table, table").before(form);

  function show() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean), query = new URLSearchParams();
    let shown = 0;
    for (const { row, cells } of rows) {
      const text = cells.join(" ").toLowerCase();
      const fits = choices.every(({ column, select }) => !select.value || values(cells[column]).includes(select.value))
        && wanted.every((word) => text.includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length}`;
    for (const { name, select } of choices) if (select.value) query.set(name, select.value);
    if (words.value) query.set("words", words.value);
    history.replaceState(null, "", query.size ? `?${query}` : location.pathname);
  }
  form.addEventListener("input", show);
  show();
}

document.querySelectorAll(".md-typeset table:not([class])").forEach(labelled);
document.querySelectorAll(".filtered").forEach(filtered);

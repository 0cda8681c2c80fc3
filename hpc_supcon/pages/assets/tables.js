/* Tables are sorted by their headings, and reduced to marked rows. */
(() => {
  const { element, recall, remember } = page;

  function sortable(table) {
    const headings = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const original = [...body.rows];
    if (original.length < 2 || table.classList.contains("fixed")) return;
    headings.forEach((heading, column) => {
      const text = heading.textContent;
      const button = element("button", { type: "button", onclick: () => sort(column) }, text || "name");
      heading.replaceChildren(button);
      heading.setAttribute("aria-sort", "none");
    });

    function sort(column) {
      const before = headings[column].getAttribute("aria-sort");
      const numeric = headings[column].classList.contains("n");
      // numbers: the highest first; a third click gives the order of the file again
      const order = numeric ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
      const next = order[(order.indexOf(before) + 1) % 3];
      headings.forEach((heading) => heading.setAttribute("aria-sort", "none"));
      headings[column].setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const rows = next === "none" ? original : [...original].sort((a, b) => sign * compare(a, b, column, sign));
      body.append(...rows);
    }
  }

  /** Empty cells are last in both directions. */
  function compare(a, b, column, sign) {
    const [first, second] = [a.cells[column], b.cells[column]];
    const [x, y] = [first.dataset.v, second.dataset.v];
    if (x !== undefined && y !== undefined) return Number(x) - Number(y);
    const [s, t] = [first.textContent, second.textContent];
    if (!s || !t) return s === t ? 0 : sign * (s ? -1 : 1);
    return s.localeCompare(t, "en", { numeric: true });
  }

  function filterable(holder) {
    const label = holder.querySelector(".filter");
    const box = label.querySelector("input");
    const rows = [...holder.querySelectorAll("tbody tr")];
    const marked = rows.filter((row) => row.querySelector(".mark"));
    if (!marked.length || marked.length === rows.length) return;
    label.hidden = false;
    box.checked = recall("filter") ?? true;
    const show = () => {
      for (const row of rows) row.hidden = box.checked && !marked.includes(row);
      remember("filter", box.checked);
    };
    box.addEventListener("change", show);
    show();
  }

  page.prepareTables = (root) => {
    root.querySelectorAll("table").forEach(sortable);
    root.querySelectorAll(".filtered").forEach(filterable);
  };
})();

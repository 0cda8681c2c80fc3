/* Starts the page: what is seen first is drawn first. A part that fails leaves the others alone. */
(() => {
  page.prepareTables(document);
  const holders = [...document.querySelectorAll("[data-widget]")];
  function draw(holder) {
    try {
      page.widgets[holder.dataset.widget](holder);
    } catch (error) {
      console.error(error);
      holder.replaceChildren(page.element("p", { class: "note" }, `This part cannot be drawn: ${error.message}`));
    }
  }
  const first = holders.filter((holder) => holder.closest("header"));
  first.forEach(draw);
  setTimeout(() => holders.filter((holder) => !first.includes(holder)).forEach(draw));

  if (document.querySelector('meta[http-equiv="refresh"]')) {
    const kept = page.recall("scroll");
    if (kept) setTimeout(() => scrollTo({ top: kept, behavior: "instant" }));
    addEventListener("pagehide", () => page.remember("scroll", scrollY));
  }
})();

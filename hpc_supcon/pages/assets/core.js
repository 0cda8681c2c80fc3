"use strict";
/* What all parts of the page share: its data, elements, choices, colors, and what is remembered. */
const page = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const decoded = new Map();

  /** The bytes of a blob, decoded once. */
  function bytes(key) {
    if (!decoded.has(key)) {
      const text = atob(data.blobs[key]);
      const found = new Uint8Array(text.length);
      for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
      decoded.set(key, found);
    }
    return decoded.get(key);
  }
  const uint16 = (key) => new Uint16Array(bytes(key).buffer);
  const uint32 = (key) => new Uint32Array(bytes(key).buffer);

  /** An element with attributes and children; text is never read as markup. Attributes "onclick" are listeners. */
  function element(tag, attributes = {}, ...children) {
    const found = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) found.addEventListener(name.slice(2), value);
      else if (value === true) found.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) found.setAttribute(name, value);
    }
    found.append(...children);
    return found;
  }

  /**
   * A choice of one of `options`, [{value, label, disabled}]: segments for a few short ones, else a list. Null where
   * there is nothing to choose.
   */
  let names = 0;
  function choice(legend, options, value, onchange) {
    if (options.length < 2) return null;
    const letters = options.reduce((sum, option) => sum + option.label.length, 0);
    if (options.length > 5 || letters > 40) {
      const select = element("select", { onchange: () => onchange(options[select.selectedIndex].value) });
      for (const option of options) {
        const selected = option.value === value;
        select.append(element("option", { selected, disabled: option.disabled }, option.label));
      }
      return element("label", {}, `${legend} `, select);
    }
    const name = `choice-${names++}`;
    const segments = element("span", { class: "segments" });
    for (const option of options) {
      const input = element("input", {
        type: "radio", name, checked: option.value === value, disabled: option.disabled,
        onchange: () => onchange(option.value),
      });
      segments.append(element("label", {}, input, option.label));
    }
    return element("fieldset", {}, element("legend", {}, legend), segments);
  }

  /** Fills `holder` with controls again, and keeps the focus on the control that had it. */
  function fill(holder, ...controls) {
    const focusable = () => [...holder.querySelectorAll("input, select, button")];
    const at = focusable().indexOf(document.activeElement);
    holder.replaceChildren(...controls.filter(Boolean));
    const again = focusable()[at];
    if (again && again.type === "radio") holder.querySelector(`input[name="${again.name}"]:checked`).focus();
    else if (again) again.focus();
  }

  /* Okabe and Ito's palette without the colors that are hard to see on white or on black, with some of Tol's between
     them: neighbors differ in lightness, so that color-blind readers tell them apart too. */
  const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f7ad6", "#a89c2e", "#b3446c",
    "#7d8791"];
  const ON_DARK = ["#4aa3e6", "#f0b323", "#2fc08f", "#e08fbb", "#8fd0f7", "#f08242", "#a99bea", "#cabd4e", "#d96c94",
    "#9aa5b0"];
  function color(i, n) {
    if (n <= PALETTE.length) return (isDark() ? ON_DARK : PALETTE)[i];
    const lightness = (isDark() ? [58, 70, 80] : [40, 52, 64])[i % 3];
    return `hsl(${Math.round((i * 137.508) % 360)} 58% ${lightness}%)`;
  }

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => dark.matches && document.documentElement.dataset.print === undefined;
  const redraws = [];
  /** Calls `redraw` when colors change: another scheme, or printing, for which the page is light. */
  function onTheme(redraw) {
    redraws.push(redraw);
  }
  const redrawAll = () => redraws.forEach((redraw) => redraw());
  dark.addEventListener("change", redrawAll);
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.print = "";
    redrawAll();
  });
  addEventListener("afterprint", () => {
    delete document.documentElement.dataset.print;
    redrawAll();
  });

  /* What was chosen is kept while the page is open, also when it is read again. Without storage it is forgotten. */
  const prefix = `hpc-supcon ${location.pathname} `;
  function recall(key) {
    try {
      return JSON.parse(sessionStorage.getItem(prefix + key));
    } catch {
      return null;
    }
  }
  function remember(key, value) {
    try {
      sessionStorage.setItem(prefix + key, JSON.stringify(value));
    } catch {
      /* forgotten */
    }
  }

  /** A number as in the tables. */
  function shown(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (Number.isInteger(value)) return value.toLocaleString("en-US");
    return size === 0 || (size >= 0.001 && size < 100) ? value.toFixed(4) : value.toPrecision(4);
  }

  /** Sizes a canvas for the screen's pixels; returns its context, scaled to CSS pixels. */
  function fit(canvas, width, height) {
    const ratio = Math.min(3, Math.max(devicePixelRatio, 1));
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    return context;
  }

  const widgets = {};
  return { data, bytes, uint16, uint32, element, choice, fill, color, style, onTheme, recall, remember, shown, fit,
    widgets };
})();

// What is wrong with the page, as a list of sentences. For harness/tests/report_in_browser.rs.
(() => {
  const wrong = [];
  const name = (e) => `${e.tagName.toLowerCase()}.${e.className?.baseVal ?? e.className} "${(e.textContent ?? "").trim().slice(0, 40)}"`;
  const page = document.documentElement;
  // Not innerWidth: a phone widens that to what the page wants.
  const width = page.clientWidth;
  if (page.scrollWidth > width) {
    const wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll") && e.getBoundingClientRect().right > width + 1);
    wrong.push(`the page is ${page.scrollWidth} px wide: ${wide.slice(0, 3).map(name).join("; ")}`);
  }
  for (const [what, selector] of [
    ["a head of a table without a scope", "th:not([scope])"],
    ["a picture without a text", "img:not([alt]), img[alt='']"],
    ["a drawing without a text", "[role=img]:not([aria-label])"],
    ["a part that scrolls and cannot be reached by keyboard", ".scroll:not([tabindex])"],
    ["a link to nowhere", "a:not([href^='#'])"],
    ["a script", "script, [onclick], [onerror], [onload], iframe, object, embed, form"],
  ]) {
    const found = document.querySelectorAll(selector);
    if (found.length) wrong.push(`${what}: ${found.length}, as ${name(found[0])}`);
  }
  for (const link of document.querySelectorAll("a[href^='#']")) {
    if (!document.getElementById(link.getAttribute("href").slice(1))) wrong.push(`a link to no place: ${link.getAttribute("href")}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  const twice = ids.filter((id, at) => ids.indexOf(id) !== at);
  if (twice.length) wrong.push(`the same id twice: ${twice[0]}`);
  if (document.querySelectorAll("h1").length !== 1) wrong.push("not one main heading");
  if (width < 600 && Math.min(...[...document.querySelectorAll("nav a, summary")].map((e) => e.offsetHeight).filter((h) => h > 0)) < 24) wrong.push("a target too small for a finger");

  // WCAG 2.2, 1.4.3: text has a contrast of 4.5 at least.
  const parse = (text) => {
    const numbers = (text.match(/-?[\d.]+(e-?\d+)?/g) ?? []).map(Number);
    const scale = text.startsWith("color(") ? 1 : 255;
    const [r, g, b, a = 1] = numbers;
    return numbers.length < 3 ? null : [r / scale, g / scale, b / scale, a];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const ground = (e) => {
    const layers = [];
    for (let at = e; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor) ?? [0, 0, 0, 0]);
    return layers.reverse().reduce((below, top) => over(top, below), [1, 1, 1, 1]);
  };
  const luminance = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const pale = new Map();
  for (const e of document.querySelectorAll("body *")) {
    if (e.closest(".skip") || ![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e);
    const colour = parse(e.namespaceURI.endsWith("svg") ? style.fill : style.color);
    if (!colour) continue;
    const below = ground(e);
    const ink = over([...colour.slice(0, 3), colour[3] * Number(style.opacity)], below);
    const [light, dark] = [luminance(ink), luminance(below)].sort((a, b) => b - a);
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < 4.5) pale.set(`${style.color} on ${getComputedStyle(e).backgroundColor}`, `${contrast.toFixed(2)} of ${name(e)}`);
  }
  for (const says of [...pale.values()].slice(0, 10)) wrong.push(`too little contrast: ${says}`);
  return wrong;
})();

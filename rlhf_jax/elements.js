"use strict";
// Elements of the pages: the report of a run, and the web chat. Texts of models and of users are only ever set as text.

function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && typeof value !== "string") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((each) => each !== null));
  return node;
}

const HIDDEN = /(?![\t\n\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
// Characters that are invisible, or that change the direction of writing, as escapes, like the terminal's in
// report/rollouts.py; two joiners stay, which scripts and emoji need.
const visible = (text) => String(text).replace(HIDDEN, (c) => {
  const code = c.codePointAt(0).toString(16).padStart(4, "0");
  return code.length > 4 ? `\\u{${code}}` : "\\u" + code;
});

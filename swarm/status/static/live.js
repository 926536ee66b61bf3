// Keeps an open page up to date: when the server says that there is something new, the main part is
// fetched again and put in place. Without this script the page works all the same.
"use strict";
(() => {
  const events = new EventSource("/events");
  let busy = false;
  const refresh = async () => {
    const main = document.querySelector("main");
    const typing = main.contains(document.activeElement) &&
      document.activeElement.matches("input, select");
    if (busy || document.hidden || typing) return;
    busy = true;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (!answer.ok) return;
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      const next = fresh.querySelector("main");
      const focused = document.activeElement && document.activeElement.id;
      if (next) main.replaceWith(document.adoptNode(next));
      if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
    } finally {
      busy = false;
    }
  };
  events.addEventListener("snapshot", refresh);
  document.addEventListener("visibilitychange", refresh);
})();

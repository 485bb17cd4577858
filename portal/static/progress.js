// Shows progress without loading the page anew, so that a screen reader is not
// sent back to its beginning. Without JavaScript the page reloads itself.
"use strict";

const INTERVAL = 4000; // milliseconds

async function look() {
  const here = document.getElementById("progress");
  try {
    const answer = await fetch(location.href, { credentials: "same-origin" });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const there = page.getElementById("progress");
    if (answer.ok && there !== null) {
      const [old, now] = [here, there].map((part) => part.querySelector("[role=status]"));
      if (old.textContent !== now.textContent) {
        here.replaceWith(there);
      } else {
        // The same stage: what is announced stays as it is, only the numbers change.
        now.replaceWith(old);
        here.replaceWith(there);
      }
    }
  } catch {
    // The server or the network is away for a moment: look again later.
  }
  if (!document.getElementById("progress").hasAttribute("data-final")) {
    setTimeout(look, INTERVAL);
  }
}

setTimeout(look, INTERVAL);

// The page of a run that is served: its parts are replaced by those of each page that the server sends. Nothing in them can run:
// they come out of a parser that runs nothing, and the policy of this page allows this script alone.
const live = document.getElementById("live");
const events = new EventSource("events");
events.onmessage = (event) => {
  const fresh = new DOMParser().parseFromString(JSON.parse(event.data), "text/html");
  const opened = [...document.querySelectorAll("details")].map((one) => one.open);
  for (const part of ["header", "main", "footer"]) document.querySelector(part).replaceWith(fresh.querySelector(part));
  document.title = fresh.title;
  document.querySelectorAll("details").forEach((one, number) => { one.open = Boolean(opened[number]); });
  live.textContent = "This page changes as the run goes on.";
  tellValues();
};
events.addEventListener("end", (event) => { events.close(); live.textContent = JSON.parse(event.data); });
events.onerror = () => { live.textContent = "The server of this page does not answer: what is shown is no longer new."; };
